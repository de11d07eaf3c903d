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
from game import UsageError, make_env
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
    return folder / "echo.html", text, read(text), view.levels_of(learners, episode)


def read(text):
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def picture(sheet, i):
    """Picture i of a sheet in [0, 1], as the page's script finds it."""
    file = BytesIO(base64.b64decode(sheet["src"][i // sheet["per"]]))
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
        found.append((latent, *model.heads.outlook(latent)[:2]))
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
        r"https?:|//\w+\.\w|@import|url\(|<link(?! rel=.icon. href=.data)", text
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
    heads = levels[0].learner.subactor.world_model.heads
    assert data["steps"] == 21
    assert data["ended"]
    assert data["levels"][0]["at"] == list(range(21))
    for t in range(21):
        close(picture(data["seen"], t), rgb(lived.steps.obs[t] / 255))
        decoded = seen(heads, lived.latent.z[t], lived.latent.h[t])
        close(picture(data["levels"][0]["decoded"], t), decoded, ROUNDING)


def test_upper_levels_are_decoded_through_those_below(made):
    _, _, data, levels = made
    for i in (1, 2):
        latent = levels[i].lived.latent
        assert data["levels"][i]["at"] == [*range(0, 21, 2**i)]
        for r in range(len(latent.h)):
            decoded = view.decode_down(levels[i].decoders, latent.z[r], latent.h[r])
            found = picture(data["levels"][i]["decoded"], r)
            close(found, rgb(decoded), ROUNDING)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_imagination_is_the_models_own_roll_out(made, i):
    """As played, by the actor and under each fixed action, from every kept row."""
    _, _, data, levels = made
    level, part = levels[i], data["levels"][i]["imagined"]
    lived, F = level.lived, part["steps"]
    names = data["actions"] if i == 0 else []
    assert part["choices"] == ["as played", "the actor", *names]
    assert part["rows"] == [*range(0, len(lived.at) - 1, part["every"])]
    keys = jax.random.split(jax.random.key(0), len(part["rows"]))
    w = len(part["rows"]) - 1
    row = part["rows"][w]
    later = [min(row + f, len(lived.at) - 1) for f in range(F)]
    # A row's action led to it: what is chosen at a row stands in the next one.
    real = [lived.steps.action[min(r + 1, len(lived.at) - 1)] for r in later]
    plans = [real, [None] * F, *([[a]] * F for a in range(len(names)))]
    for c, plan in enumerate(plans):
        found = roll(level.learner.subactor, *begin(level, row), plan, keys[w])
        sure = len(lived.at) - 1 - row if c == 0 else F  # no plan after the end
        shown = range(1, F + 1) if c < 2 else part["ahead"]
        first = w * part["pictures"]["per"] + min(c, 2) * F
        first += max(0, c - 2) * len(part["ahead"])
        close(part["reward"][w][c][:sure], [x[1] for x in found][:sure])
        close(part["cont"][w][c][:sure], [x[2] for x in found][:sure])
        for place, k in enumerate(shown):
            if k <= sure:
                latent = found[k - 1][0]
                decoded = view.decode_down(level.decoders, latent.z, latent.h)
                decoded = rgb(decoded)
                close(picture(part["pictures"], first + place), decoded, ROUNDING)


def test_a_fixed_action_is_fixed_and_matters(made):
    _, _, _, levels = made
    subactor = levels[0].learner.subactor
    start, goal = begin(levels[0], 3)
    A = subactor.action_shape[1]
    forced = jnp.arange(A)[:, None, None] * jnp.ones((1, 5, 1), int)
    one = lambda f: view.dream(subactor, start, goal, f, key=jax.random.key(3))
    found = jax.vmap(one)(forced)
    np.testing.assert_array_equal(found.action, forced)
    assert len(np.unique(np.asarray(found.h[:, 0]).round(4), axis=0)) == A


def test_goals_are_those_in_force(made):
    """Codes, the closest state by brute force, and the goal decoded with its z."""
    _, _, data, levels = made
    for i in (0, 1):
        level, part = levels[i], data["levels"][i]["goals"]
        lived, learner = level.lived, level.learner
        assert part["at"] == levels[i + 1].lived.at.tolist()
        for g, t in enumerate(part["at"]):
            row = lived.at.tolist().index(t)
            assert part["code"][g] == lived.steps.goal[row].tolist()
            code = jax.nn.one_hot(part["code"][g], MODEL.code_classes)
            G = learner.subactor.autoencoder.decode(code)
            S = learner.standardiser(jnp.asarray(lived.latent.h))
            agreement = [float(subgoal_reward(G, s)) for s in S]
            k = part["closest"][g]
            close(part["agreement"][g], max(agreement))
            close(agreement[k], max(agreement))
            h = view.symexp(learner.standardiser.inverse(G))
            decoded = view.decode_down(level.decoders, lived.latent.z[k], h)
            decoded = rgb(decoded)
            close(picture(part["decoded"], g), decoded, ROUNDING)
    assert data["levels"][2]["goals"] is None


def test_branches_are_the_sequences_that_lead_to_them(made):
    _, _, data, levels = made
    part, level, A = data["branches"], levels[0], len(data["actions"])
    keys = jax.random.split(jax.random.key(0), len(part["rows"]))
    assert part["depth"] > 1
    for w, path in ((0, (0,)), (1, (A - 1, 1)), (4, (1,) * part["depth"])):
        node = 0
        for a in path:
            node = A * node + 1 + a
        rest = [[0]] * part["repeat"] * (part["depth"] - len(path))
        plan = [[a] for a in path for _ in range(part["repeat"])]
        start = begin(level, part["rows"][w])
        found = roll(level.learner.subactor, *start, plan + rest, keys[w])[: len(plan)]
        close(part["total"][w][node], sum(x[1] for x in found))
        close(part["cont"][w][node], np.prod([x[2] for x in found]))
        shown = picture(part["pictures"], w * part["pictures"]["per"] + node)
        heads = level.learner.subactor.world_model.heads
        close(shown, seen(heads, found[-1][0].z, found[-1][0].h), ROUNDING)


def test_thinning_keeps_every_second_start_until_it_fits(made):
    _, _, data, _ = made
    levels = json.loads(json.dumps(data["levels"]))
    size = lambda: sum(len(s) for x in levels for s in x["imagined"]["pictures"]["src"])
    room = size() // 3
    view.thin(levels, room)
    assert size() <= room
    for old, new in zip(data["levels"], levels, strict=True):
        old, new = old["imagined"], new["imagined"]
        skip = new["every"] // old["every"]
        assert skip > 1
        for name in ("rows", "action", "reward", "cont"):
            assert new[name] == old[name][::skip]
        assert new["pictures"]["src"] == old["pictures"]["src"][::skip]
    view.thin(levels, 0)  # one start is always kept
    assert {len(x["imagined"]["rows"]) for x in levels} == {1}


def test_a_flat_agent_has_no_goals():
    config = replace(CONFIG, levels=1)
    env = make_env(config, 0)
    shape, actions = env.observation_space.shape, int(env.action_space.n)
    learners = scatter(init_learners(config, shape, actions, key=jax.random.key(0)))
    text = view.page(config, learners, let_play(config, learners, 1), False)
    (level,) = read(text)["levels"]
    assert level["goals"] is None
    assert read(text)["branches"] is None
    assert not read(text)["ended"]


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
def tab(browser, made):
    """The page in a fresh tab; afterwards: no error, nothing fetched."""
    path, _, _, _ = made
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    far = lambda request: not request.url.startswith(("file:", "data:", "about:"))
    tab.on("request", lambda r: far(r) and complaints.append(r.url))
    tab.goto(path.as_uri())
    yield tab
    context.close()
    assert complaints == []


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
    curve = tab.locator("#curves svg[role=img]").first
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    tab.mouse.move(box["x"] + 46, box["y"] + 50)
    tab.mouse.down()
    assert step(tab) == 0
    tab.mouse.move(box["x"] + box["width"] - 16, box["y"] + 50, steps=3)
    tab.mouse.up()
    assert step(tab) == 20
    tab.mouse.move(box["x"] + 46, box["y"] + 50)
    assert step(tab) == 20


def test_pictures_on_the_screen_are_those_of_the_data(tab, made):
    data = made[2]
    tab.evaluate("go(7)")
    settle(tab)
    same = lambda name, sheet, i: close(
        pixels(tab, name)[..., :3], picture(data["levels"][0][sheet], i), 0.01
    )
    close(pixels(tab, "#seen")[..., :3], picture(data["seen"], 7), 0.01)
    same("#decoded", "decoded", 7)
    error = abs(picture(data["seen"], 7) - picture(data["levels"][0]["decoded"], 7))
    close(pixels(tab, "#error")[..., :3], error, 0.02)
    part = data["levels"][0]["imagined"]
    w, F, n = 7 // part["every"], part["steps"], data["seen"]["w"]
    assert f"at step {part['rows'][w]}:" in tab.text_content("#dream-text")
    strips = tab.locator("#strip canvas")
    assert strips.count() == 3 + len(data["actions"])
    first, fixed = w * part["pictures"]["per"], part["ahead"].index(8)
    for canvas, i in (
        (1, 8 - 1),  # as played, 8 steps on
        (2, F + 8 - 1),  # the actor
        (4, 2 * F + len(part["ahead"]) + fixed),  # always action 1
    ):
        shown = pixels(tab, f"#strip canvas:nth-child({3 * canvas + 2})")
        cell = shown[:, 8 * n : 9 * n, :3]
        close(cell, picture(part["pictures"], first + i), 0.01)
    truth = pixels(tab, "#strip canvas:nth-child(2)")
    end = 20 - part["rows"][w]  # after the last step there is no truth
    close(truth[:, end * n : (end + 1) * n, :3], picture(data["seen"], 20), 0.01)
    assert truth[:, (end + 1) * n :].max() == 0


def test_levels_switch_and_blanks_are_said(tab, made):
    data = made[2]
    tab.evaluate("go(3)")
    tab.get_by_role("button", name="level 1").click()
    settle(tab)
    assert tab.get_attribute("#levels button >> nth=1", "aria-pressed") == "true"
    assert pixels(tab, "#decoded").max() == 0
    assert "blank: level 1 acts every 2 steps" in tab.get_attribute(
        "#decoded", "aria-label"
    )
    tab.keyboard.press("ArrowRight")
    settle(tab)
    shown = picture(data["levels"][1]["decoded"], 2)
    close(pixels(tab, "#decoded")[..., :3], shown, 0.01)
    assert "set by level 2 at step 4" in tab.get_attribute("#goal", "aria-label")
    tab.keyboard.press("2")
    settle(tab)
    assert "nobody sets a goal" in tab.get_attribute("#goal", "aria-label")


def test_a_human_plays_in_imagination(tab, made):
    data = made[2]
    part, A = data["branches"], len(data["actions"])
    tab.select_option("#tree", "1")
    button = tab.locator("#actions button")
    button.nth(2).click()
    tab.keyboard.press("b")
    settle(tab)
    first, second = 1 + 2, A * 3 + 1 + 1
    per, w = part["pictures"]["per"], part["pictures"]["w"]
    shown = pixels(tab, "#path")[..., :3]
    for i, node in enumerate((0, first, second)):
        close(
            shown[:, i * w : (i + 1) * w], picture(part["pictures"], per + node), 0.01
        )
    while button.first.is_enabled():
        button.first.click()
        settle(tab)
    log = json.loads(tab.input_value("#json"))["choices"]
    assert [x["action"] for x in log[:2]] == [data["actions"][2], data["actions"][1]]
    assert len(log) == part["depth"]
    assert {x["start"] for x in log} == {part["at"][1]}
    close(log[1]["reward"], part["total"][1][second] - part["total"][1][first])
    close(log[1]["total"], part["total"][1][second])
    tab.click("#undo")
    tab.click("#again")
    assert len(json.loads(tab.input_value("#json"))["choices"]) == part["depth"] - 1
    with tab.expect_download() as download:
        tab.click("#save")
    kept = json.loads(download.value.path().read_text())
    assert kept == json.loads(tab.input_value("#json"))


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
    assert order == ["run", "step", *levels, "before", "after", "span"]
    unnamed = "canvas, [role=img], input, select, textarea"
    unnamed = ", ".join(f"{x}:not([aria-label], label *)" for x in unnamed.split(", "))
    assert tab.locator(unnamed).count() == 1  # the screen, which echo does not have


@pytest.mark.parametrize("width", [380, 1200])
def test_dark_and_narrow(tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    settle(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper() == "rgb(255, 255, 255)"
    tab.emulate_media(color_scheme="dark")
    assert paper() == "rgb(20, 22, 26)"
