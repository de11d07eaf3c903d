"""The page: its arrays against the model's own, and its keys in a real browser.

Untrained levels would be too alike: parameters are drawn at random instead.
"""

import base64
import json
import re
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
from config import TINY
from diagnose import decode_down
from game import UsageError, make_env
from imagine import levels_of
from nets import symexp
from play import episode as let_play
from run import load_weights, save_weights
from subgoal import subgoal_reward

MODEL = replace(TINY.model, channels=(), strides=(), layers=1, head_layers=1)
CONFIG = replace(TINY, game="echo", period=2, model=MODEL)
ROUNDING = 0.5 / view.SHADES + 0.5 / 255 + 1e-3
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
close = lambda a, b, atol=1e-3: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)


def scatter(learners):
    """Levels with random parameters, their variances positive."""
    leaves, tree = jax.tree.flatten(learners)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    for i, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        if leaf.dtype == jnp.float32:
            leaves[i] = leaf + 0.3 * jax.random.normal(key, leaf.shape)
    var = lambda learner: learner.standardiser.var
    spread = lambda x: eqx.tree_at(var, x, 0.5 + jnp.abs(var(x)))
    return tuple(map(spread, jax.tree.unflatten(tree, leaves)))


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
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


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
    assert data["steps"] == 21
    assert data["levels"][0]["at"] == list(range(21))
    for t in range(21):
        close(picture(data["sheets"]["seen"], t), rgb(lived.steps.obs[t] / 255))
        decoded = seen(heads, lived.latent.z[t], lived.latent.h[t])
        close(picture(data["sheets"]["decoded0"], t), decoded, ROUNDING)


def test_upper_levels_are_decoded_through_those_below(made):
    _, _, data, levels = made
    for i in (1, 2):
        latent = levels[i].lived.latent
        assert data["levels"][i]["at"] == [*range(0, 21, 2**i)]
        for r in range(len(latent.h)):
            decoded = decode_down(levels[i].decoders, latent.z[r], latent.h[r])
            found = picture(data["sheets"][f"decoded{i}"], r)
            close(found, rgb(decoded), ROUNDING)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_imagination_is_the_models_own_roll_out(made, i):
    """As played, by the actor and under each fixed action, from every kept row."""
    _, _, data, levels = made
    level, part = levels[i], data["levels"][i]["imagined"]
    lived, F, strips = level.lived, view.IMAGINED, part["strips"]
    names = data["actions"] if i == 0 else []
    assert len(strips) == 3 + len(names)
    rows = [lived.at.tolist().index(t) for t in part["at"]]
    assert rows == [*range(0, len(lived.at) - 1, 2)]
    keys = jax.random.split(jax.random.key(0), len(rows))
    w = len(rows) - 1
    row = rows[w]
    later = [min(row + f, len(lived.at) - 1) for f in range(F)]
    # A row's action led to it: what is chosen at a row stands in the next one.
    real = [lived.steps.action[min(r + 1, len(lived.at) - 1)] for r in later]
    plans = [real, [None] * F, *([[a]] * F for a in range(len(names)))]
    seen = [*range(row, len(lived.at))]
    truth = [lived.at[r] for r in seen] + [-1] * (F + 1 - len(seen))
    assert strips[0]["sheet"] == "seen"
    assert strips[0]["cells"][w] == truth
    for strip, c in zip(strips[1:], range(len(plans)), strict=True):
        found = roll(level.learners[-1].subactor, *begin(level, row), plans[c], keys[w])
        sure = len(lived.at) - 1 - row if c == 0 else F  # no plan after the end
        cells, total = strip["cells"][w], 0
        decoded = decode_down(level.decoders, lived.latent.z[row], lived.latent.h[row])
        sheet = data["sheets"][strip["sheet"]]
        close(picture(sheet, cells[0]), rgb(decoded), ROUNDING)
        for k in range(1, F + 1):
            (latent, reward, cont, action), said = found[k - 1], strip["said"][w][k]
            if k > sure:
                assert (cells[k], said) == (-1, "the episode is over")
                continue
            total += reward
            numbers, *name = said.replace("−", "-").split(": ")
            close([float(x) for x in numbers.split(", ")], [reward, total, cont])
            assert name == ([names[int(action[0])]] if names and c == 1 else [])
            assert (cells[k] < 0) == (c > 1 and k not in view.AHEAD)
            if cells[k] >= 0:
                decoded = decode_down(level.decoders, latent.z, latent.h)
                close(picture(sheet, cells[k]), rgb(decoded), ROUNDING)


def code_of(sheet, i):
    """Classes of a code from its squares, the brightest of a row."""
    return picture(sheet, i)[3 :: view.SQUARE, 3 :: view.SQUARE].mean(-1).argmax(-1)


def test_goals_are_those_in_force(made):
    """Codes, the closest state by brute force, and the goal decoded with its z."""
    _, _, data, levels = made
    for i in (0, 1):
        level, part = levels[i], data["levels"][i]["figures"]
        lived, learner = level.lived, level.learners[-1]
        above = levels[i + 1].lived.at
        (k,) = (part["change"][1][f"decoded{i}"],)
        assert part["closest"][1]["seen"] == lived.at[k].tolist()
        for name in ("goal", "closest", "change", "code"):
            assert part[name][0] == i + 1
        for g, t in enumerate(above):
            row = lived.at.tolist().index(t)
            goal = lived.steps.goal[row]
            assert code_of(data["sheets"][f"code{i}"], g).tolist() == goal.tolist()
            code = jax.nn.one_hot(goal, MODEL.code_classes)
            G = learner.subactor.autoencoder.decode(code)
            S = learner.standardiser(jnp.asarray(lived.latent.h))
            agreement = [float(subgoal_reward(G, s)) for s in S]
            assert (
                part["closest"][2][g]
                == f"step {lived.at[k[g]]}: r_g {max(agreement):.3g}"
            )
            close(agreement[k[g]], max(agreement))
            end = [*above, 21][g + 1] - 1
            said = f"set by level {i + 1} at step {t}, held to {max(end, t)}"
            assert part["goal"][2][g] == said
            h = symexp(learner.standardiser.inverse(G))
            decoded = rgb(decode_down(level.decoders, lived.latent.z[k[g]], h))
            close(picture(data["sheets"][f"goal{i}"], g), decoded, ROUNDING)
        for r, s in enumerate(lived.thoughts.state):
            own = learner.subactor.autoencoder.encode(jnp.asarray(s)).argmax(-1)
            assert code_of(data["sheets"][f"own{i}"], r).tolist() == own.tolist()
            same = int((own == lived.steps.goal[r]).sum())
            now = lived.thoughts.rewards["subgoal"][r]
            assert part["own"][2][r] == f"{same} of {len(own)}, r_g {now:.3g}"
    assert data["levels"][2]["figures"]["goal"][1:] == [
        {"seen": []},
        ["blank: nobody sets a goal for level 2"],
    ]


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
    faint = {"extrinsic reward": y, "predicted extrinsic reward": y}
    assert 'class="l0 faint"' in view.curve("extrinsic reward", levels, [faint, {}])


def test_the_page_says_the_numbers_of_every_level(made):
    _, _, data, levels = made
    for level, part in zip(levels, data["levels"], strict=True):
        thoughts, numbers = level.lived.thoughts, part["numbers"]
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
    assert data["chosen"] == [*levels[0].chosen[:-1, 0], -1]


def test_branches_are_the_sequences_that_lead_to_them(made):
    _, _, data, levels = made
    part, level, A = data["branches"], levels[0], len(data["actions"])
    trees, sheet = part["trees"], data["sheets"]["branches"]
    keys = jax.random.split(jax.random.key(0), len(trees))
    assert part["depth"] > 1
    for w, path in ((0, (0,)), (1, (A - 1, 1)), (4, (1,) * part["depth"])):
        node = 0
        for a in path:
            node = A * node + 1 + a
        rest = [[0]] * part["repeat"] * (part["depth"] - len(path))
        plan = [[a] for a in path for _ in range(part["repeat"])]
        start = begin(level, trees[w]["at"])
        found = roll(level.learners[-1].subactor, *start, plan + rest, keys[w])[
            : len(plan)
        ]
        close(trees[w]["total"][node], sum(x[1] for x in found))
        close(trees[w]["reward"][node], sum(x[1] for x in found[-part["repeat"] :]))
        close(trees[w]["cont"][node], np.prod([x[2] for x in found]))
        shown = picture(sheet, trees[w]["first"] + node)
        heads = level.learners[-1].subactor.world_model.heads
        close(shown, seen(heads, found[-1][0].z, found[-1][0].h), ROUNDING)


def test_thinning_keeps_every_second_start_until_it_fits(made):
    """A level with more starts goes first; what is kept stays where it was."""
    data = json.loads(json.dumps(made[2]))
    parts = [x["imagined"] for x in data["levels"]]
    sheets = [data["sheets"][f"imagined{i}"] for i in range(3)]
    size = lambda: sum(len(s) for x in sheets for s in x["src"])
    assert [len(x["at"]) for x in parts] == [10, 5, 3]
    view.thin(parts, sheets, size() - 1)
    assert [len(x["at"]) for x in parts] == [5, 5, 3]
    assert sheets[1:] == [made[2]["sheets"][f"imagined{i}"] for i in (1, 2)]
    old, new = made[2]["levels"][0]["imagined"], parts[0]
    assert new["at"] == old["at"][::2]
    for before, after in zip(old["strips"], new["strips"], strict=True):
        assert after["cells"] == before["cells"][::2]
        assert after["said"] == before["said"][::2]
    kept, all_ = sheets[0]["src"], made[2]["sheets"]["imagined0"]["src"]
    assert kept[::2] == all_[::2]
    assert set(kept[1::2]) == {""}
    view.thin(parts, sheets, size() // 2)
    assert size() > 0
    view.thin(parts, sheets, 0)  # one start is always kept
    assert [len(x["at"]) for x in parts] == [1, 1, 1]
    assert all(x["src"][0] for x in sheets)


def flat_page(steps):
    config = replace(CONFIG, levels=1)
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = scatter(init_learners(config, shape, actions, key=jax.random.key(0)))
    return view.page(config, learners, let_play(config, learners, steps), False)


def test_a_flat_agent_has_no_goals():
    data = read(flat_page(2))
    (level,) = data["levels"]
    assert level["figures"]["goal"][2] == ["blank: nobody sets a goal for level 0"]
    assert "closest" not in level["figures"]
    assert data["branches"] is None
    assert data["chosen"][-1] >= 0  # the episode has not ended


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^--episode-steps 0 .* 1 or more$"):
        view.main(tmp_path, episode_steps=0)
    with pytest.raises(UsageError, match=r"^--seed -1 .* 0 or more$"):
        view.main(tmp_path, seed=-1)
    with pytest.raises(UsageError, match=r"^--out .* no folder"):
        view.main(tmp_path, out=tmp_path / "a" / "b.html")
    with pytest.raises(UsageError, match="no checkpoint"):
        view.main(tmp_path)


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


def settle(tab):
    """Waits until pictures are decoded and drawn."""
    tab.evaluate("""async () => {
        for (let i = 0; i < 4; i++) await new Promise(requestAnimationFrame);
        await new Promise((done) => setTimeout(done, 50));
        await new Promise(requestAnimationFrame);
    }""")


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
    settle(tab)
    return int(re.match(r"Step (\d+)", tab.text_content("#status"))[1])


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
        ("Shift+ArrowRight", 11),
        ("Shift+ArrowRight", 20),
        ("ArrowLeft", 19),
        ("2", 19),
        (",", 16),
        (".", 20),
        ("1", 20),
        (",", 18),
    ):
        press(keys)
        assert step(tab) == expected, keys
    box = tab.locator("#step").bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert step(tab) == 10
    press("Shift+ArrowLeft")  # not the slider's own step, though it has the focus
    assert step(tab) == 0
    curve = tab.locator("#curves svg").first
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    tab.mouse.move(box["x"] + 2, box["y"] + 50)
    tab.mouse.down()
    assert step(tab) == 0
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50, steps=3)
    tab.mouse.up()
    assert step(tab) == 20
    tab.mouse.move(box["x"] + 2, box["y"] + 50)
    assert step(tab) == 20


def test_buttons_do_what_keys_do(tab):
    named = lambda name: tab.get_by_role("button", name=name, exact=True)
    tab.keyboard.press("1")
    named("acts ▸").click()
    assert step(tab) == 2
    named("◂ acts").click()
    assert step(tab) == 0
    named("▶ play").click()
    assert tab.get_attribute("#status", "aria-live") == "off"
    tab.wait_for_function("t > 1")
    named("❚❚ pause").press(" ")  # the button's own click, not a second one
    at = step(tab)
    tab.wait_for_timeout(300)
    assert step(tab) == at < 20
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press(" ")
    tab.wait_for_function("t === last && timer === undefined")
    assert "the episode ends" in tab.text_content("#status")


def test_curves_have_a_cursor_ticks_and_the_numbers_of_this_step(tab, made):
    data = made[2]
    tab.evaluate("go(7)")
    tab.keyboard.press("1")
    settle(tab)
    boxes = tab.evaluate("""() => [...document.querySelectorAll(".wide")].map((x) => {
        const line = x.querySelector("i").getBoundingClientRect();
        const all = x.getBoundingClientRect();
        return [(line.left - all.left) / all.width, all.width];
    })""")
    assert len(boxes) == 8
    close([at for at, _ in boxes], [7 / 20] * 8, 0.01)
    for i, at in ((0, 7), (1, 6), (2, 4)):
        numbers, row = data["levels"][i]["numbers"], data["levels"][i]["at"].index(at)
        said = tab.text_content(f"[data-name='surprise'][data-of='{i}']")
        assert said.startswith(f"level {i} at {at}: ")
        value = float(said.split(": ")[1].replace("−", "-"))
        close(value, numbers["surprise"][row], 0.01 * abs(value) + 1e-6)
    ticks = "[...document.querySelectorAll('.x span')].map((x) => x.textContent)"
    assert tab.evaluate(ticks)[:5] == ["0", "5", "10", "15", "20"]
    tab.evaluate("document.querySelector('#span').options[0].value = 8; later()")
    settle(tab)
    assert tab.evaluate(ticks)[:5] == ["3", "5", "7", "9", "11"]
    wide = "document.querySelector('.wide').getBoundingClientRect().width"
    close(tab.evaluate(wide), boxes[0][1] * 20 / 8, 1)
    weight = "getComputedStyle(document.querySelector('path.l{}')).strokeWidth"
    assert [tab.evaluate(weight.format(i)) for i in (0, 1)] == ["1px", "2px"]


def test_pictures_on_the_screen_are_those_of_the_data(tab, made):
    data = made[2]
    sheets, part = data["sheets"], data["levels"][0]["imagined"]
    tab.evaluate("go(7)")
    settle(tab)
    same = lambda figure, sheet, i: close(
        pixels(tab, f"#{figure} canvas")[..., :3], picture(sheets[sheet], i), 0.01
    )
    same("seen", "seen", 7)
    same("decoded", "decoded0", 7)
    same("goal", "goal0", 3)
    same("z", "z0", 7)
    same("own", "own0", 7)
    same("code", "code0", 3)
    error = abs(picture(sheets["seen"], 7) - picture(sheets["decoded0"], 7))
    close(pixels(tab, "#error canvas")[..., :3], error, 0.02)
    bars = tab.locator("#policy0 li").all_text_contents()
    marks = [" ◂ chosen" * (a == data["chosen"][7]) for a in range(len(bars))]
    names = zip(data["actions"], data["policy"][7], marks, strict=True)
    assert bars == [f"{name} {p} %{mark}" for name, p, mark in names]
    w, n = part["at"].index(6), sheets["seen"]["w"]
    assert "at step 6, 1 agent steps per column" in tab.text_content("#from")
    assert tab.locator("#strips canvas").count() == 3 + len(data["actions"])
    for c, strip in enumerate(part["strips"]):
        shown = pixels(tab, f"#strips figure:nth-of-type({c + 1}) canvas")
        for k, cell in enumerate(strip["cells"][w]):
            found = shown[:, k * n : (k + 1) * n]
            if cell < 0:
                assert found.max() == 0
            else:
                close(found[..., :3], picture(sheets[strip["sheet"]], cell), 0.01)
        said = tab.text_content(f"#strips figure:nth-of-type({c + 1}) figcaption")
        assert said == strip["said"][w][1]
    mark = tab.locator("#mark").bounding_box()
    canvas = tab.locator("#strips canvas").first.bounding_box()
    close(mark["x"] - canvas["x"], canvas["width"] / 17, 2)
    close(mark["width"], canvas["width"] / 17, 4)
    ticks = tab.locator("#strips small").all_text_contents()
    assert ticks == ["+0", "+4", "+8", "+12", "+16"]


def test_levels_switch_and_blanks_are_said(tab, made):
    data = made[2]
    label = lambda figure: tab.get_attribute(f"#{figure} canvas", "aria-label")
    tab.evaluate("go(3)")
    tab.get_by_role("button", name="level 1").click()
    settle(tab)
    assert tab.get_attribute("#levels button >> nth=1", "aria-pressed") == "true"
    assert pixels(tab, "#decoded canvas").max() == 0
    assert "blank: level 1 acts every 2 steps" in label("decoded")
    tab.keyboard.press("ArrowRight")
    settle(tab)
    shown = picture(data["sheets"]["decoded1"], 2)
    close(pixels(tab, "#decoded canvas")[..., :3], shown, 0.01)
    policy = picture(data["sheets"]["policy1"], 2)
    close(pixels(tab, "#policy canvas")[..., :3], policy, 0.01)
    assert "set by level 2 at step 4" in label("goal")
    ticks = tab.locator("#strips small").all_text_contents()
    assert ticks == ["+0", "+8", "+16", "+24", "+32"]
    assert tab.locator("#strips canvas:visible").count() == 3
    tab.keyboard.press("2")
    settle(tab)
    assert "nobody sets a goal for level 2" in label("goal")
    assert not tab.locator("#closest").is_visible()


def test_a_flat_agent_in_the_browser(visit, tmp_path):
    """One level, no goals, no branches; and an episode of a single step."""
    for steps in (9, 1):
        path = tmp_path / f"{steps}.html"
        path.write_text(flat_page(steps))
        tab = visit(path)
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("1")  # there is no such level
        assert step(tab) == min(1, steps - 1)
        assert tab.locator("#levels button").count() == 1
        assert not tab.locator("#human").is_visible()
        label = tab.get_attribute("#goal canvas", "aria-label")
        assert "nobody sets a goal for level 0" in label
        data = read(path.read_text())
        seen = picture(data["sheets"]["seen"], min(1, steps - 1))
        close(pixels(tab, "#seen canvas")[..., :3], seen, 0.01)
        names = [x.split("\n")[0] for x in tab.locator("h3").all_text_contents()]
        assert names == [x for x in view.CURVES if x in data["levels"][0]["numbers"]]
        assert "subgoal reward" not in names


def test_a_human_plays_in_imagination(tab, made):
    data = made[2]
    part, A = data["branches"], len(data["actions"])
    tab.select_option("#tree", "1")
    button = tab.locator("#actions button")
    button.nth(2).click()
    tab.keyboard.press("b")
    settle(tab)
    first, second = 1 + 2, A * 3 + 1 + 1
    tree, sheet = part["trees"][1], data["sheets"]["branches"]
    shown, w = pixels(tab, "#path canvas")[..., :3], sheet["w"]
    for i, node in enumerate((0, first, second)):
        found = picture(sheet, tree["first"] + node)
        close(shown[:, i * w : (i + 1) * w], found, 0.01)
    assert shown[:, 3 * w :].max() == 0
    while button.first.is_enabled():
        button.first.click()
        settle(tab)
    log = json.loads(tab.input_value("#json"))["choices"]
    assert [x["action"] for x in log[:2]] == [data["actions"][2], data["actions"][1]]
    assert len(log) == part["depth"]
    assert {x["start"] for x in log} == {tree["at"]}
    close(log[1]["reward"], tree["total"][second] - tree["total"][first], 2e-3)
    close(log[1]["total"], tree["total"][second])
    cells = tab.locator("#log tr >> nth=1 >> td").all_text_contents()
    assert cells == [str(tree["at"]), *map(str, list(log[1].values())[1:])]
    tab.keyboard.press("Backspace")
    tab.click("#again")
    assert tab.locator("#undo").is_disabled()
    assert len(json.loads(tab.input_value("#json"))["choices"]) == part["depth"] - 1
    tab.context.grant_permissions(["clipboard-read"])
    tab.click("#copy")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == tab.input_value("#json")
    with tab.expect_download() as download:
        tab.click("#save")
    kept = json.loads(download.value.path().read_text())
    assert kept == json.loads(tab.input_value("#json"))


def test_letters_choose_only_where_actions_are_chosen(tab):
    tab.keyboard.press("a")
    settle(tab)
    assert json.loads(tab.input_value("#json"))["choices"] == []
    tab.focus("#again")
    tab.keyboard.press("a")
    settle(tab)
    assert len(json.loads(tab.input_value("#json"))["choices"]) == 1


def test_the_keyboard_reaches_everything_in_order(tab):
    order = []
    for _ in range(8):
        tab.keyboard.press("Tab")
        order.append(
            tab.evaluate(
                "document.activeElement.id || document.activeElement.textContent"
            )
        )
    levels = ["level 0", "level 1", "level 2"]
    assert order == ["run", "step", *levels, "◂ acts", "acts ▸", "span"]
    settle(tab)
    unnamed = "canvas, [role=img], input, select, textarea"
    named = ":not([aria-label], [aria-labelledby], label *, [hidden] *)"
    unnamed = ", ".join(x + named for x in unnamed.split(", "))
    assert tab.locator(unnamed).count() == 0
    for name in view.CURVES:
        text = tab.locator(f'[id="curve-{name}"]').text_content()
        assert name in text
        assert view.CURVES[name] in text


@pytest.mark.parametrize("width", [380, 1200])
def test_dark_and_narrow(tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    settle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper() == "rgb(255, 255, 255)"
    tab.emulate_media(color_scheme="dark")
    assert paper() == "rgb(20, 22, 26)"
