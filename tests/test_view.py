"""The page: its arrays against the model's own, and its keys in a real browser.

Untrained levels would be too alike: parameters are drawn at random instead.
"""

import base64
import json
import re
import runpy
import shutil
from dataclasses import replace
from io import BytesIO

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from PIL import Image

import view
from agent import init_learners
from config import TINY, UsageError
from diagnose import decode_down
from dreams import levels_of
from game import make_env
from nets import symexp
from play import Episode
from play import episode as let_play
from run import load_weights, save_weights
from subgoal import subgoal_reward

MODEL = replace(TINY.model, channels=(), strides=(), layers=1, head_layers=1)
CONFIG = replace(TINY, game="echo", period=2, model=MODEL)
ROUNDING = 0.5 / view.SHADES + 0.5 / 255 + 1e-3
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
close = lambda a, b, atol=1e-3: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)


def scatter(learners):
    """Levels with random parameters, their variances positive, level i updated i."""
    leaves, tree = jax.tree.flatten(learners)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    for i, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        if leaf.dtype == jnp.float32:
            leaves[i] = leaf + 0.3 * jax.random.normal(key, leaf.shape)
    var = lambda learner: learner.standardiser.var
    spread = lambda x: eqx.tree_at(var, x, 0.5 + jnp.abs(var(x)))
    learners = map(spread, jax.tree.unflatten(tree, leaves))
    updated = lambda x, i: eqx.tree_at(lambda x: x.updates, x, x.updates + i)
    return tuple(updated(x, i) for i, x in enumerate(learners))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page by the command line, its data, and the episode behind it."""
    folder = tmp_path_factory.mktemp("weights")
    env = make_env(CONFIG, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = scatter(init_learners(CONFIG, shape, actions, key=jax.random.key(0)))
    save_weights(folder / "echo.ckpt", CONFIG, learners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "keep_compiled", lambda: None)
        patch.setattr(view, "EVERY", 2)
        patch.setattr(view, "BRANCH_NODES", 120)
        view.main(folder / "echo.ckpt", play=True, out=folder / "echo.html")
    text = (folder / "echo.html").read_text()
    config, learners = load_weights(folder / "echo.ckpt")
    episode = let_play(config, learners, 2000, seed=0)
    return folder / "echo.html", text, read(text), levels_of(learners, episode)


def read(text):
    """The script's data, and the files of its sheets: hidden pictures of the page."""
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    for name, sheet in data["sheets"].items():
        files = re.findall(rf'<img id="{name}-(\d+)" src="([^"]+)"', text)
        assert [int(k) for k, _ in files] == [*range(len(files))]
        sheet["src"] = [src for _, src in files]
    return data


def cells(panel, sheet):
    """What a panel shows of a sheet, row by row; figures have one cell a row."""
    rows = dict(panel["layers"])[sheet]
    return [row[0] if len(row) == 1 else row for row in rows]


def picture(sheet, i):
    """Picture i of a sheet in [0, 1], as the page's script finds it."""
    source = sheet["src"][i // sheet["per"]].removeprefix("data:image/webp;base64,")
    file = BytesIO(base64.b64decode(source))
    whole = np.asarray(Image.open(file).convert("RGB")) / 255
    row, column = divmod(i % sheet["per"], sheet["columns"])
    h, w = sheet["h"], sheet["w"]
    return whole[row * h : (row + 1) * h, column * w : (column + 1) * w]


def rgb(pixels):
    return view.to_rgb(np.asarray(pixels, float))


def seen(heads, z, h):
    """What level 0's decoder says, on the page's scale."""
    pixels = heads.decoder(jnp.concatenate([z.reshape(-1), h])) + 0.5
    return rgb(np.clip(pixels, 0, 1))


def roll(subactor, start, goal, actions, key):
    """`dream` as a plain loop; None lets the actor choose."""
    model, latent, found = subactor.world_model.discretise(), start, []
    keys = jax.random.split(key, len(actions))
    for action, one in zip(actions, keys, strict=True):
        act_key, model_key = jax.random.split(one)
        if action is None:
            action = subactor.act(latent, goal, key=act_key)
        code = jax.nn.one_hot(jnp.asarray(action), subactor.action_shape[1])
        latent = model.imagine(latent.carry, code, key=model_key)
        found.append((latent, *model.heads.outlook(latent)[:2], action))
    return found


def begin(level, row):
    """Latent and goal of a row."""
    start = jax.tree.map(lambda x: jnp.asarray(x[row]), level.lived.latent)
    goal = level.lived.steps.goal
    return start, None if goal is None else jnp.asarray(goal[row])


def test_hook_is_live():
    with pytest.raises(TypeCheckError):
        view.sheet(np.zeros((2, 3), np.uint8), 1, 1)


def test_the_page_needs_nothing_else(made):
    _, text, _, _ = made
    assert len(text) < view.PAGE_BYTES
    # Data cannot hold these characters in a row: base64 has no colon.
    assert not re.findall(
        r"https?:|//\w+\.\w|@import|url\(|<link(?! rel=.icon. href=.data)|{{", text
    )
    assert re.findall(r"\s(?:src|href)=\"(?!data:)[^\"]*", text) == []


def test_the_page_says_whose_episode_it_is(made):
    _, text, _, levels = made
    points = f"{levels[0].lived.steps.reward.sum():.4g}"
    assert f"21 agent steps, return {points}. Preset tiny, world model s5. " in text
    said = "Level 0 and up act every 1 / 2 / 4 steps and had 0 / 1 / 2 updates."
    assert said in text


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_sheets_keep_bytes_and_round_predictions(channels):
    pixels = np.random.default_rng(0).random((7, 4, 5, channels))
    bytes_ = (pixels > 0.5).astype(np.uint8) * 255
    exact, rounded = view.sheet(bytes_, 4, 3), view.sheet(pixels, 4, 3)
    assert len(exact["src"]) == 2
    for i in range(7):
        np.testing.assert_array_equal(
            picture(exact, i), np.rint(view.to_rgb(bytes_[i] / 255) * 255) / 255
        )
        if channels < 4:
            assert abs(picture(rounded, i) - pixels[i]).max() <= ROUNDING


def test_real_frames_and_reconstructions(made):
    """At every step what level 0 saw, and what its decoder makes of its latent."""
    _, _, data, levels = made
    lived = levels[0].lived
    heads = levels[0].learners[-1].subactor.world_model.heads
    assert data["clocks"][0]["acts"] == data["clocks"][0]["step"] == [*range(21)]
    assert cells(data["panels"][0]["seen"], "seen") == [*range(21)]
    assert cells(data["panels"][0]["decoded"], "decoded0") == [*range(21)]
    for t in range(21):
        close(picture(data["sheets"]["seen"], t), rgb(lived.steps.obs[t] / 255))
        decoded = seen(heads, lived.latent.z[t], lived.latent.h[t])
        close(picture(data["sheets"]["decoded0"], t), decoded, ROUNDING)


def test_upper_levels_are_decoded_through_those_below(made):
    _, _, data, levels = made
    for i in (1, 2):
        latent = levels[i].lived.latent
        acts = data["clocks"][i]["acts"]
        assert acts == [-1 if t % 2**i else t // 2**i for t in range(21)]
        error = data["panels"][i]["error"]
        assert cells(error, "seen") == [*range(0, 21, 2**i)]
        assert cells(error, f"decoded{i}") == [*range(len(latent.h))]
        for r in range(len(latent.h)):
            decoded = decode_down(levels[i].decoders, latent.z[r], latent.h[r])
            found = picture(data["sheets"][f"decoded{i}"], r)
            close(found, rgb(decoded), ROUNDING)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_imagination_is_the_models_own_roll_out(made, i):
    """As played, by the actor and under each fixed action, from every kept row."""
    _, _, data, levels = made
    level, F, panels = levels[i], view.IMAGINED, data["panels"][i]
    lived, clocks = level.lived, data["clocks"][i]
    points = np.asarray(levels[0].lived.steps.reward)
    names = data["actions"] if i == 0 else []
    strips = [panels[f"strip{c}"] for c in range(3 + len(names))]
    assert f"strip{len(strips)}" not in panels
    rows = [*range(0, len(lived.at) - 1, 2)]
    for t in range(21):
        row = (lived.at <= t).sum() - 1
        start = max(w for w, first in enumerate(rows) if first <= row)
        assert (clocks["start"][t], clocks["column"][t]) == (start, row - rows[start])
        assert clocks["told"][t] == start * (F + 1) + row - rows[start]
    keys = jax.random.split(jax.random.key(0), len(rows))
    w = len(rows) - 1
    row = rows[w]
    later = [min(row + f, len(lived.at) - 1) for f in range(F)]
    # A row's action led to it: what is chosen at a row stands in the next one.
    real = [lived.steps.action[min(r + 1, len(lived.at) - 1)] for r in later]
    plans = [real, [None] * F, *([[a]] * F for a in range(len(names)))]
    seen = [*range(row, len(lived.at))]
    truth = [lived.at[r] for r in seen] + [-1] * (F + 1 - len(seen))
    assert cells(strips[0], "seen")[w] == truth
    ahead = np.minimum(row + np.arange(F + 1), len(lived.at) - 1)
    for k, t in enumerate(lived.at[ahead]):
        real = f"from step {lived.at[row]}: real Σ r "
        found = strips[0]["said"][w * (F + 1) + k].removeprefix(real)
        close(float(found), points[lived.at[row] + 1 : t + 1].sum())
    for strip, c in zip(strips[1:], range(len(plans)), strict=True):
        found = roll(level.learners[-1].subactor, *begin(level, row), plans[c], keys[w])
        sure = len(lived.at) - 1 - row if c == 0 else F  # no plan after the end
        ((name, shown),), total = strip["layers"], 0
        shown, sheet = shown[w], data["sheets"][name]
        decoded = decode_down(level.decoders, lived.latent.z[row], lived.latent.h[row])
        close(picture(sheet, shown[0]), rgb(decoded), ROUNDING)
        for k in range(1, F + 1):
            latent, reward, cont, action = found[k - 1]
            said = strip["said"][w * (F + 1) + k]
            if k > sure:
                assert (shown[k], said) == (-1, "the episode is over")
                continue
            total += reward
            numbers, *name = said.split(": ")
            close([float(x) for x in numbers.split(", ")], [reward, total, cont])
            assert name == ([names[int(action[0])]] if names and c == 1 else [])
            assert (shown[k] < 0) == (c > 1 and k not in view.AHEAD)
            if shown[k] >= 0:
                decoded = decode_down(level.decoders, latent.z, latent.h)
                close(picture(sheet, shown[k]), rgb(decoded), ROUNDING)


def code_of(sheet, i):
    """Classes of a code from its squares, the brightest of a row."""
    return picture(sheet, i)[3 :: view.SQUARE, 3 :: view.SQUARE].mean(-1).argmax(-1)


def test_goals_are_those_in_force(made):
    """Codes, the closest state by brute force, and the goal decoded with its z."""
    _, _, data, levels = made
    for i in (0, 1):
        level, part = levels[i], data["panels"][i]
        lived, learner = level.lived, level.learners[-1]
        above = levels[i + 1].lived.at
        held = [max(g for g, s in enumerate(above) if s <= t) for t in range(21)]
        assert data["clocks"][i]["goal"] == held
        for name in ("goal", "closest", "code"):
            assert part[name]["clock"] == part[name]["told"] == "goal"
            assert len(part[name]["said"]) == len(above)
        for g, t in enumerate(above):
            row = lived.at.tolist().index(t)
            goal = lived.steps.goal[row]
            assert code_of(data["sheets"][f"code{i}"], g).tolist() == goal.tolist()
            code = jax.nn.one_hot(goal, MODEL.code_classes)
            G = learner.subactor.autoencoder.decode(code)
            S = learner.standardiser(jnp.asarray(lived.latent.h))
            agreement = [float(subgoal_reward(G, s)) for s in S]
            near, best = part["closest"]["said"][g].split(": r_g ")
            k = lived.at.tolist().index(int(near.removeprefix("step ")))
            assert cells(part["closest"], "seen")[g] == lived.at[k]
            close([agreement[k], float(best)], max(agreement))
            end = [*above, 21][g + 1] - 1
            said = f"set by level {i + 1} at step {t}, held to {max(end, t)}"
            assert part["goal"]["said"][g] == said
            h = symexp(learner.standardiser.inverse(G))
            decoded = rgb(decode_down(level.decoders, lived.latent.z[k], h))
            close(picture(data["sheets"][f"goal{i}"], g), decoded, ROUNDING)
    top = data["panels"][2]["goal"]
    assert {x for _, rows in top["layers"] for (x,) in rows} == {-1}
    assert (top["said"], top["blank"]) == ([], "blank: nobody sets level 2 a goal")


def test_codes_are_squares_and_what_was_chosen_is_framed(made):
    """Black 0 to white 1, an orange frame round what was chosen for the level below."""
    _, _, data, levels = made
    inner = lambda seen: seen[3 :: view.SQUARE, 3 :: view.SQUARE]
    frame = lambda seen: seen[:: view.SQUARE, :: view.SQUARE]
    for i, level in enumerate(levels):
        for r, z in enumerate(level.lived.latent.z):
            shown = picture(data["sheets"][f"z{i}"], r)
            close(inner(shown), np.repeat(np.asarray(z)[..., None], 3, -1))
            close(frame(shown), np.broadcast_to(view.GREY, (*z.shape, 3)) / 255)
        for r, policy in enumerate(level.lived.thoughts.policy) if i else ():
            shown = picture(data["sheets"][f"policy{i}"], r)
            close(inner(shown), np.repeat(policy[..., None], 3, -1), 0.5 / 255 + 1e-3)
            orange = (frame(shown) == np.array(view.ORANGE) / 255).all(-1)
            below = levels[i - 1].lived
            goal = below.steps.goal[below.at.tolist().index(level.lived.at[r])]
            over = level.lived.at[r] == 20
            assert orange.sum(-1).tolist() == [0 if over else 1] * len(goal)
            assert over or orange.argmax(-1).tolist() == goal.tolist()


def test_curves_are_drawn_to_scale_and_broken_where_a_number_is_missing(made):
    levels = made[3][:2]
    y = np.array([1.0, 2.0, np.nan, -2.0, *[0.0] * 17])
    numbers = [{"surprise": y}, {"surprise": np.arange(11.0) - 2}]
    html = view.curve("surprise", levels, numbers)
    paths = dict(re.findall(r'<path class="(l\d[ \w]*?) *" d="(\S.*?)"', html))
    # From 8 at the top to -2 at the bottom.
    assert paths["l0"].startswith("M0 70L1 60M3 100L4 80L5 80")
    assert paths["l1"].startswith("M0 100L2 90L4 80")
    assert paths["l1 dots"].startswith("M0 100h0M2 90h0")
    assert re.findall(r"<span>([^<]+)</span>", html) == ["8", "3", "-2"]
    assert 'viewBox="0 0 20 100"' in html
    assert view.CURVES["surprise"] in html
    ticks = re.findall(r'<span class="(\w*)" style="left: (.+?)%">(\d+)<', html)
    assert ticks == [("", f"{5 * t:.2f}", str(t)) for t in range(0, 21, 4)]
    flat = view.curve("surprise", levels, [{"surprise": np.zeros(21)}])
    assert 'd="M0 100L1 100' in flat
    at = np.arange(401)
    long = [levels[0]._replace(lived=levels[0].lived._replace(at=at))]
    html = view.curve("surprise", long, [{"surprise": at / 1.0}])
    found = re.findall(r'<span class="(\w*)" style="[^"]+">(\d+)<', html)
    assert found == [("fine" * (t % 80 > 0), str(t)) for t in range(0, 401, 20)]
    faint = {"extrinsic reward": y, "predicted extrinsic reward": y}
    assert 'class="l0 faint"' in view.curve("extrinsic reward", levels, [faint, {}])


def test_the_page_says_the_numbers_of_every_level(made):
    _, _, data, levels = made
    for i, level in enumerate(levels):
        thoughts, numbers = level.lived.thoughts, view.series(level)
        for name, x in numbers.items():
            said = data["texts"][f"{name} {i}"]
            close(said, x[[(level.lived.at <= t).sum() - 1 for t in range(21)]])
        close(numbers["surprise"], thoughts.surprise)
        for name, reward in thoughts.rewards.items():
            close(numbers[f"{name} reward"], reward)
        for name, value in thoughts.values.items():
            close(numbers[f"{name} value"], value)
        heads = level.learners[-1].subactor.world_model.heads
        latent = jax.tree.map(lambda x: jnp.asarray(x[1]), level.lived.latent)
        found = numbers["predicted extrinsic reward"][1], numbers["continuation"][1]
        close(found, heads.outlook(latent)[:2])
    policy = levels[0].lived.thoughts.policy[:, 0]
    close(np.array(data["policy"]) / 100, policy, 0.006)
    chosen = [data["actions"][a] for a in levels[0].chosen[:-1, 0]]
    points = np.asarray(levels[0].lived.steps.reward)
    sure = policy[np.arange(20), levels[0].chosen[:-1, 0]]
    does = [f"{name} ({p:.0%})" for name, p in zip(chosen, sure, strict=True)]
    for t, action in enumerate([*does, "–, the end"]):
        said = f"Step {t} of 20: reward {points[t]:.3g}; chosen: {action}."
        assert data["texts"]["status"][t] == said
    assert view.rounded([1.23456, np.nan, np.inf]) == [1.235, None, None]


def test_actions_have_the_emulators_names():
    names = "noop fire right left rightfire leftfire"
    assert view.action_names(replace(TINY, game="Pong"), 6) == names.split()


def test_branches_are_the_sequences_that_lead_to_them(made):
    _, text, data, levels = made
    part, level, A = data["branches"], levels[0], len(data["actions"])
    trees, sheet = part["trees"], data["sheets"]["branches"]
    keys = jax.random.split(jax.random.key(0), len(trees))
    assert part["depth"] > 1
    assert [tree["at"] for tree in trees] == [0, 4, 9, 14, 19]  # nothing follows 20
    buttons = re.findall(r'accesskey="(\w)" onclick="take\((\d*)\)"', text)
    assert buttons == [*zip("abcd", "0123", strict=True), ("x", "")]
    for w, path in ((0, (0,)), (1, (A - 1, 1)), (4, (1,) * part["depth"])):
        node = 0
        for a in path:
            node = A * node + 1 + a
        rest = [[0]] * view.REPEAT * (part["depth"] - len(path))
        plan = [[a] for a in path for _ in range(view.REPEAT)]
        start = begin(level, trees[w]["at"])
        found = roll(level.learners[-1].subactor, *start, plan + rest, keys[w])[
            : len(plan)
        ]
        reward = [x[1] for x in found]
        numbers = (
            sum(reward[-view.REPEAT :]),
            sum(reward),
            np.prod([x[2] for x in found]),
        )
        close([float(x) for x in trees[w]["said"][node].split(", ")], numbers)
        shown = picture(sheet, trees[w]["first"] + node)
        heads = level.learners[-1].subactor.world_model.heads
        close(shown, seen(heads, found[-1][0].z, found[-1][0].h), ROUNDING)


def test_starts_are_as_dense_as_the_room_allows(made):
    """Their number follows the bytes that pictures of reconstructions take."""
    _, _, data, levels = made
    sheets, names = {"decoded0": data["sheets"]["decoded0"]}, data["actions"]
    size = lambda x: sum(map(len, x["src"]))
    reward, starts = np.zeros(21), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "EVERY", 1)
        for room in (1e9, 2e4, 0.0):
            found = view.futures(levels[0], names, reward, sheets, room)
            starts[room], strips = found
            text = sum(map(len, map(str, (x["said"] for x in strips.values()))))
            if len(starts[room]) > 1:
                assert size(sheets["imagined0"]) + text < 2 * room
            assert len(strips["strip0"]["layers"][0][1]) == len(starts[room])
    assert starts[1e9].tolist() == [*range(20)]
    assert 1 < len(starts[2e4]) < 20
    assert starts[0.0].tolist() == [0]  # one start is always kept
    clocks = view.clocks(levels, 0, starts[0.0])
    assert clocks["column"].tolist() == [*range(21)]
    assert clocks["told"].tolist() == [*range(17), *[16] * 4]  # the last column's


def test_levels_share_the_bytes_of_pictures(made, monkeypatch):
    """All of them together take what there is, each as much as another."""
    _, _, _, levels = made
    steps, taken = levels[0].lived.steps, []

    def greedy(level, _, __, sheets, room):
        taken.append(int(room))
        sheets[f"imagined{len(taken)}"] = {"src": ["x" * taken[-1]]}
        return np.array([0]), {}

    monkeypatch.setattr(view, "futures", greedy)
    monkeypatch.setattr(view, "figures", lambda *_: {})
    obs, end = np.asarray(steps.obs), np.arange(21) == 20
    episode = Episode(obs, obs, end * 0, np.asarray(steps.reward), end, ())
    sheets = view.contents(list("abcd"), levels, [{}] * 3, episode, False)["sheets"]
    used = sum(len(src) for sheet in sheets.values() for src in sheet["src"])
    close(used, view.PICTURE_BYTES, 3)
    close(taken, taken[0], 3)


def flat_page(steps):
    config = replace(CONFIG, levels=1)
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = scatter(init_learners(config, shape, actions, key=jax.random.key(0)))
    episode = let_play(config, learners, steps)
    episode = episode._replace(frames=episode.frames.repeat(2, 1).repeat(3, 2))
    return view.page(config, learners, episode, False)


def test_a_flat_agent_has_no_goals(monkeypatch):
    monkeypatch.setattr(view, "SPAN", 0.4)
    text = flat_page(2)
    data = read(text)
    assert "so far: the episode goes on. Preset" in text
    assert "--zoom: 2.5;" in text  # 1 step of which 0.4 are in view
    screen, small = (picture(data["sheets"][x], 1) for x in ("screen", "seen"))
    np.testing.assert_array_equal(screen, small.repeat(2, 0).repeat(3, 1))
    (panels,) = data["panels"]
    assert panels["goal"]["blank"] == "blank: nobody sets level 0 a goal"
    assert "closest" not in panels
    assert data["branches"] is None
    assert "the end" not in data["texts"]["status"][-1]


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^--episode-steps 0 .* 1 or more$"):
        view.main(tmp_path, episode_steps=0)
    with pytest.raises(UsageError, match=r"^--seed -1 .* 0 or more$"):
        view.main(tmp_path, seed=-1)
    with pytest.raises(UsageError, match=r"^--out .* no folder"):
        view.main(tmp_path, out=tmp_path / "a" / "b.html")
    with pytest.raises(UsageError, match="no checkpoint"):
        view.main(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"), [("--seed=-1", "--seed -1 is"), ("--seed=1", "is not a check")]
)
def test_exit_code_2_and_a_line(tmp_path, monkeypatch, capsys, flags, says):
    file = tmp_path / "weights.ckpt"
    file.write_text("nonsense")
    monkeypatch.setattr("machine.keep_compiled", lambda: None)
    monkeypatch.setattr("sys.argv", ["view.py", str(file), flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(view.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("view.py: ") and says in error and error.count("\n") == 1


def test_flags_reach_the_episode_and_the_page(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(view, "keep_compiled", lambda: None)
    monkeypatch.setattr(view, "load_weights", lambda _: (CONFIG, ()))
    play = lambda *args, seed: asked.append((args[2], seed))
    monkeypatch.setattr(view, "let_play", play)
    page = lambda *args: asked.append(args[3]) or "x" * 2_000_000
    monkeypatch.setattr(view, "page", page)
    view.main(tmp_path, episode_steps=7, seed=3)
    view.main(tmp_path, play=True)
    assert asked == [(7, 3), False, (2000, 0), True]
    assert capsys.readouterr() == (f"{tmp_path}/view.html: 2.0 MB\n" * 2, "")
    monkeypatch.setattr(view, "PAGE_BYTES", 1_000_000)
    view.main(tmp_path)
    assert "give fewer --episode-steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, started by Playwright."""
    reason = "needs Chromium or Chrome and pip install -e '.[browser]'"
    driver = pytest.importorskip("playwright.sync_api", reason=reason)
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(reason)
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=list(quiet))


@pytest.fixture
def visit(browser):
    """Opens pages in fresh tabs; afterwards: no error, nothing fetched."""
    context, complaints = (
        browser.new_context(viewport={"width": 1200, "height": 900}),
        [],
    )
    far = lambda request: not request.url.startswith(("file:", "data:", "about:"))

    def opened(path):
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda r: far(r) and complaints.append(r.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    context.close()
    assert complaints == []


@pytest.fixture
def tab(visit, made):
    return visit(made[0])


def pixels(tab, name):
    """A canvas as (h, w, 4) in [0, 1]."""
    h, w, data = tab.evaluate(f"""() => {{
        const seen = document.querySelector("{name}"), {{width, height}} = seen;
        const copy = new OffscreenCanvas(width, height);
        const g = copy.getContext("2d", {{willReadFrequently: true}});
        g.drawImage(seen, 0, 0);
        return [height, width, [...g.getImageData(0, 0, width, height).data]];
    }}""")
    return np.array(data).reshape(h, w, 4) / 255


def step(tab):
    return int(re.match(r"Step (\d+)", tab.text_content("#status"))[1])


def go(tab, t):
    tab.evaluate("t => { slider.value = t; show(); }", t)


def test_a_page_opens_at_the_step_of_its_address(tab, made):
    tab.goto("about:blank")
    tab.goto(f"{made[0].as_uri()}#7")
    assert step(tab) == 7


def test_keys_and_mouse_scrub(tab):
    press = tab.keyboard.press
    assert step(tab) == 0
    for keys, expected in (
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("PageDown", 0),
        ("End", 20),
        ("ArrowRight", 20),
        ("ArrowLeft", 19),
        ("2", 19),
        ("Shift+ArrowLeft", 16),
        ("Shift+ArrowRight", 20),
        ("1", 20),
        ("Shift+ArrowLeft", 18),
        ("ArrowLeft", 17),
        ("Shift+ArrowRight", 18),
        ("0", 18),
        ("Shift+ArrowRight", 19),
    ):
        press(keys)
        assert step(tab) == expected, keys
    box = tab.locator("#step").bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert step(tab) == 10
    press("ArrowLeft")  # once, though the slider has the focus and moves by itself
    assert step(tab) == 9
    curve = tab.locator(".plot").first
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    for part, expected in ((0.995, 20), (0.005, 0), (0.6, 12)):
        tab.mouse.click(box["x"] + part * box["width"], box["y"] + 50)
        assert step(tab) == expected
    press("Alt+ArrowRight")  # left to the browser
    assert step(tab) == 12


def test_curves_have_a_cursor_ticks_and_the_numbers_of_this_step(tab, made):
    _, _, data, levels = made
    go(tab, 7)
    tab.keyboard.press("1")
    boxes = tab.evaluate("""() => [...all(".plot .wide")].map((x) => {
        const line = x.querySelector("i").getBoundingClientRect();
        const whole = x.getBoundingClientRect();
        return [(line.left - whole.left) / whole.width, whole.width];
    })""")
    assert len(boxes) == 8
    close([at for at, _ in boxes], [7 / 20] * 8, 0.01)
    for i, at in ((0, 7), (1, 6), (2, 4)):
        row = levels[i].lived.at.tolist().index(at)
        surprise = levels[i].lived.thoughts.surprise[row]
        close(float(tab.text_content(f"[data-of='surprise {i}']")), surprise)
        assert data["texts"][f"surprise {i}"][7] == data["texts"][f"surprise {i}"][at]
    where = """() => [...document.querySelectorAll(".x .wide")[0].children].map((x) => {
        const all = x.parentElement.getBoundingClientRect();
        const here = x.getBoundingClientRect();
        return [+x.textContent, (here.left + here.width / 2 - all.left) / all.width];
    })"""
    ticks = tab.evaluate(where)
    assert [t for t, _ in ticks] == [0, 4, 8, 12, 16, 20]
    close([at for _, at in ticks], [t / 20 for t, _ in ticks], 0.01)
    weight = "getComputedStyle(document.querySelector('path.l{}')).strokeWidth"
    assert [tab.evaluate(weight.format(i)) for i in (0, 1)] == ["1px", "2px"]


def test_long_curves_move_with_the_step_within_the_episode(tab):
    """The window is narrower than the episode unless all of it is wanted."""
    tab.add_style_tag(content="#curves { --zoom: 4 !important; }")
    lefts = """() => ["i", ".wide", ".plot"].map((x) =>
        document.querySelector(`#curves ${x}`).getBoundingClientRect())
        .map((x) => [x.left, x.width])"""
    for t, place in ((0, 0), (1, 0.2), (10, 0.5), (20, 1)):
        go(tab, t)
        (line, _), (wide, width), (plot, whole) = tab.evaluate(lefts)
        close(width, 4 * whole, 8)
        close((line - plot) / whole, place, 0.02)
        assert wide <= plot + 2
        assert wide + width >= plot + whole - 2


def test_pictures_on_the_screen_are_those_of_the_data(tab, made):
    data = made[2]
    sheets, panels = data["sheets"], data["panels"][0]
    go(tab, 7)
    same = lambda figure, sheet, i: close(
        pixels(tab, f"#{figure} canvas")[..., :3], picture(sheets[sheet], i), 0.01
    )
    same("seen", "seen", 7)
    same("decoded", "decoded0", 7)
    same("goal", "goal0", 3)
    same("z", "z0", 7)
    same("code", "code0", 3)
    error = abs(picture(sheets["seen"], 7) - picture(sheets["decoded0"], 7))
    close(pixels(tab, "#error canvas")[..., :3], error, 0.02)
    bars = tab.evaluate("[...document.querySelectorAll('meter')].map((x) => x.value)")
    assert bars == data["policy"][7]
    assert tab.locator("#policy0 label").all_inner_texts() == data["actions"]
    w, n = 3, sheets["seen"]["w"]
    assert "from step 6: " in tab.text_content("#strip0 figcaption")
    assert tab.locator("#strips canvas").count() == 3 + len(data["actions"])
    for c in range(3 + len(data["actions"])):
        strip = panels[f"strip{c}"]
        ((sheet, rows),) = strip["layers"]
        shown = pixels(tab, f"#strip{c} canvas")
        for k, cell in enumerate(rows[w]):
            found = shown[:, k * n : (k + 1) * n]
            if cell < 0:
                assert found.max() == 0
            else:
                close(found[..., :3], picture(sheets[sheet], cell), 0.01)
        said = tab.text_content(f"#strip{c} figcaption")
        assert said == strip["said"][w * 17 + 1]
    ticks = tab.locator("#strips small")
    assert ticks.all_text_contents() == [str(k) for k in range(17)]
    (marked,) = tab.locator("#strips [aria-current=true]").all_text_contents()
    assert marked == "1"
    mark, canvas = (
        ticks.nth(1).bounding_box(),
        tab.locator("#strip0 canvas").bounding_box(),
    )
    close(mark["x"] - canvas["x"], canvas["width"] / 17, 2)
    close(mark["width"], canvas["width"] / 17, 2)


def test_beyond_the_last_column_nothing_is_marked(visit, made, tmp_path):
    """As where starts are far apart: the numbers are those of the last column."""
    data = json.loads(made[1].split('id="data">')[1].split("</script>")[0])
    data["clocks"][0]["column"] = [30] * 21
    path, dump = tmp_path / "far.html", json.dumps(data)
    path.write_text(
        re.sub(r'(?s)(id="data">).*?(</script>)', lambda m: m[1] + dump + m[2], made[1])
    )
    tab = visit(path)
    assert step(tab) == 0
    assert tab.locator("#strips [aria-current=true]").count() == 0


def test_levels_switch_and_blanks_are_said(tab, made):
    data = made[2]
    label = lambda figure: tab.get_attribute(f"#{figure} canvas", "aria-label")
    go(tab, 3)
    tab.get_by_role("radio", name="1", exact=True).check()
    assert pixels(tab, "#decoded canvas").max() == 0
    assert "blank: level 1 does not act at this step" in label("decoded")
    tab.keyboard.press("ArrowRight")  # a step, not the next level
    assert step(tab) == 4
    shown = picture(data["sheets"]["decoded1"], 2)
    close(pixels(tab, "#decoded canvas")[..., :3], shown, 0.01)
    policy = picture(data["sheets"]["policy1"], 2)
    close(pixels(tab, "#policy canvas")[..., :3], policy, 0.01)
    assert "set by level 2 at step 4" in label("goal")
    assert tab.locator("#strips canvas:visible").count() == 3
    tab.keyboard.press("2")
    assert tab.get_by_role("radio", name="2", exact=True).is_checked()
    assert "nobody sets level 2 a goal" in label("goal")
    assert pixels(tab, "#goal canvas").max() == 0
    assert not tab.locator("#closest").is_visible()


def test_a_flat_agent_in_the_browser(visit, tmp_path):
    """One level, no goals, no branches; and an episode of a single step."""
    for steps in (9, 1):
        path = tmp_path / f"{steps}.html"
        path.write_text(flat_page(steps))
        tab = visit(path)
        tab.keyboard.press("ArrowRight")
        for key in "1ax":  # there is no such level, and nothing to choose
            tab.keyboard.press(key)
        assert step(tab) == min(1, steps - 1)
        assert tab.locator("[name=level]").count() == 1
        assert not tab.locator("#path").is_visible()
        label = tab.get_attribute("#goal canvas", "aria-label")
        assert "nobody sets level 0 a goal" in label
        data = read(path.read_text())
        seen = picture(data["sheets"]["seen"], min(1, steps - 1))
        close(pixels(tab, "#seen canvas")[..., :3], seen, 0.01)
        names = [x.split("\n")[0] for x in tab.locator("h3").all_text_contents()]
        assert names == [x for x in view.CURVES if f"{x} 0" in data["texts"]]
        assert "subgoal reward" not in names


def test_a_human_plays_in_imagination(tab, made):
    data = made[2]
    part, A = data["branches"], len(data["actions"])
    tab.select_option("#tree", "1")
    button = tab.locator("#actions button")
    button.nth(2).click()
    tab.keyboard.press("b")
    first, second = 1 + 2, A * 3 + 1 + 1
    tree, sheet = part["trees"][1], data["sheets"]["branches"]
    shown, w = pixels(tab, "#path canvas")[..., :3], sheet["w"]
    for i, node in enumerate((0, first, second)):
        found = picture(sheet, tree["first"] + node)
        close(shown[:, i * w : (i + 1) * w], found, 0.01)
    assert shown[:, 3 * w :].max() == 0
    assert shown.shape[1] == w * (part["depth"] + 1)
    for _ in range(part["depth"]):  # more than are left
        button.first.click()
    log = [x.split(", ") for x in tab.input_value("#log").splitlines()]
    assert len(log) == part["depth"]
    names = [data["actions"][a] for a in (2, 1, 0)]
    assert [x[2] for x in log[:3]] == names
    assert [x[:2] for x in log] == [
        [str(tree["at"]), str(k + 1)] for k in range(part["depth"])
    ]
    assert ", ".join(log[1][3:]) == tree["said"][second]
    tab.get_by_role("button", name="x start again").click()
    close(pixels(tab, "#path canvas")[:, :w, :3], picture(sheet, tree["first"]), 0.01)
    assert pixels(tab, "#path canvas")[:, w:].max() == 0
    tab.keyboard.press("a")  # the record goes on
    log = tab.input_value("#log").splitlines()
    assert len(log) == part["depth"] + 1
    assert log[-1].startswith(f"{tree['at']}, 1, {data['actions'][0]}, ")


def test_letters_show_what_they_choose(tab):
    """From the top of the page a letter leads to its button; typing is left alone."""
    tab.focus("#step")
    tab.keyboard.press("b")
    assert len(tab.input_value("#log").splitlines()) == 1
    focused = "document.activeElement.textContent"
    assert tab.evaluate(focused).startswith("b ")
    assert tab.evaluate("scrollY") > 0
    for place in ("#tree", "#log"):
        tab.focus(place)
        tab.keyboard.press("a")
    tab.keyboard.press("Control+a")
    assert len(tab.input_value("#log").splitlines()) == 1


def test_the_keyboard_reaches_everything_in_order(tab):
    assert tab.evaluate("document.activeElement.id") == "step"
    order = []
    for _ in range(4):
        tab.keyboard.press("Tab")
        order.append(
            tab.evaluate(
                "document.activeElement.accessKey || document.activeElement.id"
            )
        )
    assert order == ["0", "whole", "tree", "a"]
    unnamed = "canvas, [role=img], input, select, textarea, meter"
    named = ":not([aria-label], [aria-labelledby], label *, [hidden] *, #step)"
    unnamed = ", ".join(x + named for x in unnamed.split(", "))
    assert tab.locator(unnamed).count() == 0
    assert tab.get_by_role("slider", name="step").count() == 1
    for name in view.CURVES:
        text = tab.locator(f'[id="curve-{name}"]').text_content()
        assert name in text
        assert view.CURVES[name] in text


@pytest.mark.parametrize("width", [380, 1200])
def test_dark_and_narrow(tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper() == "rgb(255, 255, 255)"
    tab.emulate_media(color_scheme="dark")
    assert paper() == "rgb(20, 22, 26)"
