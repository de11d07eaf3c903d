def draw(run):
    pass
