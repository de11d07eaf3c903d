def draw(run): pass
