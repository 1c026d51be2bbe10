"""search.html and what stands in it: that it is what hip.py does, and that a reader can play it.

The second half opens the page in a real browser.  It wants `pip install playwright` and a Chromium: the
system's (`apt install chromium`), or Playwright's own (`playwright install chromium`).  Else it is skipped.
"""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import build_page  # noqa: E402
from build_page import HEADS, NODES, PLACES, attention_of_blocks, text_data, texts, trace  # noqa: E402

import hip  # noqa: E402
from hip import HiPConfig  # noqa: E402
from model import load  # noqa: E402

PAGE = build_page.PAGE.read_text(encoding="utf-8")
DATA = json.loads(PAGE.split(build_page.BEGIN)[1].split(build_page.END)[0])
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = [f"--disable-{x}" for x in ("background-networking", "component-update", "sync", "quic", "gpu")]


def unpacked(text: str, kind: str = "u1") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).astype(int)


def rounds_of(search: dict) -> list[np.ndarray]:
    """(branches, 3) of each round: first block, end, whether it was kept."""
    return [unpacked(x).reshape(-1, 3) for x in search["rounds"]]


def choice(search: dict) -> list[int]:
    first, _, kept = rounds_of(search)[-1].T
    return first[kept == 1].tolist()


# --- what is noted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, dict(score="max", per_head=True)], ids=["here", "paper"])
@pytest.mark.parametrize("nodes", [1, 8, 32])
@pytest.mark.parametrize("tokens", [129, 700, 1501])
def test_a_trace_is_the_search_round_by_round(tokens, nodes, way):
    g = torch.Generator().manual_seed(tokens + nodes)
    H = 1 if way else 3
    q, k = torch.randn(1, H, 32, 16, generator=g), torch.randn(1, 1, tokens, 16, generator=g)
    cfg = HiPConfig(top_k=8 * nodes, block_k=8, block_q=32, window=40, **way)
    found, selection, oracle = trace(q, k, cfg), hip.select_blocks(q, k, cfg), hip.oracle_blocks(q, k, cfg)
    for blocks, expected in ((found.chosen, selection), (found.exact, oracle)):
        assert blocks.tolist() == [b for b in expected.blocks.flatten().tolist() if b >= 0]

    lo, hi = cfg.sink_blocks, int(selection.window_start) // cfg.block_k
    alive = list(zip(found.edges[:-1].tolist(), found.edges[1:].tolist(), strict=True))
    assert alive[0][0] == lo and alive[-1][1] == hi and len(found.scores) == hi - lo
    for x in found.rounds:
        branches = list(zip(x.first.tolist(), x.last.tolist(), strict=True))
        halves = [half for f, l in alive for half in ((f, (f + l) // 2), ((f + l) // 2, l))]
        assert branches == [(f, l) for f, l in halves if f < l]
        assert torch.allclose(x.score, found.scores[x.speaker - lo], atol=1e-5)
        assert int(x.kept.sum()) == min(nodes, len(branches)) and 0 <= x.looked <= len(branches)
        if not x.kept.all():
            assert x.score[x.kept].min() >= x.score[~x.kept].max()
        alive = [branch for branch, kept in zip(branches, x.kept.tolist(), strict=True) if kept]
    assert [f for f, _ in alive] == found.chosen.tolist() and all(l - f == 1 for f, l in alive)


def test_where_nothing_is_to_choose_there_is_no_trace():
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match="nothing to search in 300 tokens"):
        trace(q, torch.randn(1, 1, 300, 16), HiPConfig())


def test_attention_of_blocks_is_softmax_over_what_each_row_sees():
    q, k = torch.randn(2, 5, 8), torch.randn(21, 8)
    got, expected = attention_of_blocks(q, k, 4), torch.zeros(2, 6)
    for h in range(2):
        for r in range(5):
            seen = 21 - 5 + r + 1
            p = torch.softmax(k[:seen] @ q[h, r] * 8**-0.5, 0)
            for t in range(seen):
                expected[h, t // 4] += p[t] / 5
    assert torch.allclose(got, expected, atol=1e-6)


# --- what stands in the page -------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_is_small():
    assert len(PAGE.encode()) <= 1_000_000
    code = PAGE.split(build_page.BEGIN)[0] + PAGE.split(build_page.END)[-1]
    for word in ("http:", "https:", "src=", "<link", "@import", "url(", "fetch(", "import("):
        assert word not in code, word


def test_every_search_of_the_page_is_whole():
    group, lo = DATA["group"], DATA["lo"]
    assert (DATA["nodes"], DATA["heads"]) == ([*NODES], [[*x] for x in HEADS])
    assert HiPConfig().budget == 32 in NODES and len(DATA["texts"]) == 3
    for text in DATA["texts"]:
        assert len(text["queries"]) == len(PLACES) and len(text["blocks"]) * DATA["block_k"] >= text["tokens"]
        for query in text["queries"]:
            hi = query["hi"]
            assert query["text"].strip() and [len(ways) for ways in query["heads"]] == [group + 1] * len(
                HEADS
            )
            for way in (way for ways in query["heads"] for way in ways):
                attention, low = unpacked(way["attention"], "<u2") / 65535, lo
                assert (
                    len(attention) == -(-query["end"] // DATA["block_k"]) and abs(attention.sum() - 1) < 1e-3
                )
                assert len(unpacked(way["scores"], "<u2")) == hi - low and way["range"][0] < way["range"][1]
                for M, search in way["searches"].items():
                    before = unpacked(search["edges"])
                    before = np.stack([before[:-1], before[1:]], 1)
                    for x in rounds_of(search):  # halves of what was kept, the best of them kept
                        assert x[:, :2].min() >= low and x[:, 1].max() <= hi
                        assert (x[:, 1] - x[:, 0]).sum() == (before[:, 1] - before[:, 0]).sum()
                        assert x[:, 2].sum() == min(int(M), len(x))
                        before = x[x[:, 2] == 1]
                    assert (before[:, 1] - before[:, 0] == 1).all()
                    assert len(unpacked(search["exact"])) == len(choice(search)) == min(int(M), hi - low)


def test_a_text_read_anew_is_the_one_in_the_page():
    net, tokenizer = load(dtype=torch.float32)
    title, text = next(iter(texts(tokenizer).items()))
    old, nodes = DATA["texts"][0], NODES[:1]
    with torch.inference_mode():  # some of it, which takes less time
        new = text_data(net, tokenizer, title, text, heads=HEADS[1:3], nodes=nodes)
    assert new["blocks"] == old["blocks"] and "".join(new["blocks"]) == text
    assert (new["title"], new["tokens"]) == (old["title"], old["tokens"])
    same = every = 0
    for a, b in zip(new["queries"], old["queries"], strict=True):
        assert (a["end"], a["hi"], a["text"]) == (b["end"], b["hi"], b["text"])
        for x, y in zip(sum(a["heads"], []), sum(b["heads"][1:3], []), strict=True):
            assert abs(unpacked(x["attention"], "<u2") - unpacked(y["attention"], "<u2")).max() < 655
            assert np.allclose(x["range"], y["range"], atol=0.1)
            found, known = (set(choice(z["searches"][k])) for z, k in ((x, nodes[0]), (y, str(nodes[0]))))
            same, every = same + len(found & known), every + len(known)
    assert same > 0.97 * every, "the search has changed: python notebooks/build_page.py"


def test_the_key_is_found_in_the_search_that_is_shown_first_and_not_in_another():
    text = DATA["texts"][0]
    holds = next(b for b, x in enumerate(text["blocks"]) if "The pass key is" in x)
    searches = [text["queries"][-1]["heads"][i][0]["searches"]["8"] for i in (1, 2)]
    near = [bool({holds, holds + 1} & {*choice(search)}) for search in searches]
    assert near == [True, False]


# --- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser is driven without playwright")
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, BROWSERS)), driver.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("playwright is here, but no Chromium: apt install chromium")
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--no-first-run", *QUIET]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(width, height, ...) opens the page anew; in the end nothing may have gone wrong or out."""
    wrong, contexts = [], []

    def open_page(width=390, height=844, at="", **how):
        context = browser.new_context(
            viewport=dict(width=width, height=height), reduced_motion="reduce", **how
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda x: wrong.append(x.text) if x.type in ("error", "warning") else None)
        page.on("pageerror", lambda x: wrong.append(str(x)))
        page.on("request", lambda x: None if x.url.startswith("file:") else wrong.append(x.url))
        page.goto(build_page.PAGE.as_uri() + at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def picture(page, of: str | None = None) -> np.ndarray:
    shot = page.locator(of).screenshot() if of else page.screenshot()
    return (imread(io.BytesIO(shot))[..., :3] * 255).astype(int)


def sideways(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [(320, 640, "dark"), (390, 844, "light"), (820, 1180, "light"), (1280, 900, "dark")],
)
def test_a_reader_clicks_through_all_steps(visit, width, height, scheme):
    page = visit(width, height, color_scheme=scheme, has_touch=width < 900)
    steps, titles, drawn = int(page.locator("#slide").get_attribute("max")) + 1, [], []
    press = page.tap if width < 900 else page.click
    for i in range(steps):
        page.wait_for_timeout(50)
        titles.append(page.inner_text("#words h2"))
        drawn.append(picture(page, "#stage"))
        assert sideways(page) <= 0, titles[-1]
        assert page.inner_text("#count") == f"{i + 1} / {steps}"
        assert len(np.unique(drawn[-1] @ [65536, 256, 1])) > 30  # a drawing, not a blank
        if i < steps - 1:
            press("#next")
    assert len(set(titles)) == steps == 4 + 2 * 4 and page.is_disabled("#next")
    for a, b in zip(drawn, drawn[1:], strict=False):
        assert a.shape == b.shape and (a != b).any(2).mean() > 0.0003, (
            "a step changes the drawing, not its size"
        )
    whole = picture(page)
    assert (np.median(whole) > 128) == (scheme == "light")
    for button in ("#next", "#back", "#play", "#theme"):
        box = page.locator(button).bounding_box()
        assert min(box["width"], box["height"]) >= 40, "a finger must hit it"
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height


def test_on_a_phone_drawing_and_words_are_seen_together(visit):
    page = visit(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)
    for _ in range(3):
        page.tap("#next")
    page.wait_for_timeout(300)
    bar = page.locator("nav").bounding_box()["y"]
    stage, title = (page.locator(x).bounding_box() for x in ("#stage", "#words h2"))
    assert 0 <= stage["y"] < 100 and title["y"] + title["height"] < bar


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_text_queries_head_and_budget_can_be_chosen(visit, width):
    page = visit(width, 844)
    if width <= 900:  # there the choices are folded away
        page.click("#choices summary")
    for name, choice in (("text", 2), ("query", 1), ("head", 3), ("nodes", 2), ("way", 2)):
        box = page.locator(f"#pick-{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 40
        page.locator(f"#pick-{name}").select_option(str(choice))
        assert sideways(page) <= 0
    assert page.evaluate("location.hash") == "#2.1.3.2.2.0"
    asked = DATA["texts"][2]["queries"][1]["text"].split()[-3:]
    assert " ".join(asked) in page.inner_text("#words")


def test_the_drawing_has_each_branch_and_each_block_that_spoke(visit):
    page = visit(1280, 900, "#2.3.1.0.1.5")  # two rounds, both decided
    query = DATA["texts"][2]["queries"][3]
    search = query["heads"][1][0]["searches"]["16"]
    blocks = -(-query["end"] // DATA["block_k"])
    svg = page.locator("#stage svg")
    width = float(svg.get_attribute("viewBox").split()[2]) - 6

    def drawn(kind, *names):
        shapes = svg.locator(f'{kind}[fill="var(--{names[0]})"]').all()
        return [[float(x.get_attribute(name)) for name in names[1:]] for x in shapes]

    rounds = rounds_of(search)[:2]
    for kept, dot, bar in ((1, "kept", "kept-soft"), (0, "dropped", "dropped-soft")):
        branches = np.concatenate([x[x[:, 2] == kept] for x in rounds])
        speakers = (branches[:, 0] + branches[:, 1]) // 2 + 0.5
        assert np.allclose(
            [x for (x,) in drawn("circle", dot, "cx")], 3 + speakers / blocks * width, atol=0.1
        )
        bars = [(x, x + w) for x, w, h in drawn("rect", bar, "x", "width", "height") if h == 44]
        assert np.allclose(bars, 3 + branches[:, :2] / blocks * width, atol=1.5)


def test_keys_and_slider_move_as_the_buttons_do(visit):
    page = visit(1280, 900)
    count = lambda: page.inner_text("#count")  # noqa: E731
    assert count() == "1 / 12"
    for key, expected in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 12), ("Home", 1)):
        page.keyboard.press(key)
        assert count() == f"{expected} / 12", key
    page.locator("#slide").fill("7")
    assert count() == "8 / 12"
    page.locator("#slide").press("ArrowRight")
    assert count() == "9 / 12"
    page.locator("#pick-nodes").select_option("1")  # what is chosen anew stays where it was, if it can
    page.reload()  # and the address remembers it
    assert page.locator("#pick-nodes").input_value() == "1" and count().startswith("9 / ")


def test_play_goes_on_by_itself_and_stops(visit):
    page = visit(1280, 900)
    page.clock.install()
    page.reload()
    page.click("#play")
    page.clock.run_for(60_000)
    assert page.inner_text("#count") == "12 / 12" and page.get_attribute("#play", "aria-label") == "play"


def test_the_theme_button_turns_light_into_dark_and_back(visit):
    page = visit(1280, 900, color_scheme="light")
    brightness = []
    for _ in range(3):
        brightness.append(np.median(picture(page)))
        page.click("#theme")
    assert brightness[1] < 80 < 200 < brightness[0] == brightness[2]


@pytest.mark.parametrize(
    ("text", "query", "head", "way", "nodes"), [(0, 3, 1, 0, 0), (1, 2, 2, 2, 1), (2, 3, 3, 3, 3)]
)
def test_what_is_shown_at_the_end_is_what_was_noted(visit, text, query, head, way, nodes):
    page = visit(390, 844, f"#{text}.{query}.{head}.{way}.{nodes}.0")
    noted = DATA["texts"][text]["queries"][query]["heads"][head][way]
    search, attention = noted["searches"][str(NODES[nodes])], unpacked(noted["attention"], "<u2") / 65535
    chosen, exact = choice(search), unpacked(search["exact"]).tolist()
    page.keyboard.press("End")

    def marked(kind):
        return [int(x.get_attribute("data-b")) for x in page.locator(f"#text .{kind}").all()]

    assert marked("missed") == sorted({*exact} - {*chosen})
    page.keyboard.press("ArrowLeft")
    assert marked("kept") == chosen
    share = attention[chosen].sum() * 100
    assert f"chosen {share:.{1 if share < 9.95 else 0}f}%" in page.inner_text("#shares")
    cards = page.locator("#cards button").all()
    assert len(cards) == min(16, len(chosen))
    first = max(chosen, key=lambda b: attention[b])
    assert cards[0].locator("p").inner_text().split() == DATA["texts"][text]["blocks"][first].split()
    assert (
        page.locator("#text").inner_text().split()
        == "".join(DATA["texts"][text]["blocks"][: len(attention)]).split()
    )


def test_a_tap_tells_what_a_block_says_and_how_it_fared(visit):
    page = visit(390, 844, "#0.3.2.0.0.3", has_touch=True)
    search = DATA["texts"][0]["queries"][3]["heads"][2][0]["searches"]["8"]
    first, last, kept = rounds_of(search)[0].T
    svg = page.locator("#stage svg")
    box, blocks = svg.bounding_box(), -(-DATA["texts"][0]["queries"][3]["end"] // DATA["block_k"])
    for i in (0, 9):
        speaker = int(first[i] + last[i]) // 2
        svg.tap(position=dict(x=3 + (speaker + 0.5) / blocks * (box["width"] - 6), y=95))
        told = page.inner_text("#inspect")
        assert f"Block {speaker}," in told and "Round 1: looked at" in told
        assert ("kept" if kept[i] else "dropped") in told
        assert page.locator("#text .here").get_attribute("data-b") == str(speaker)
        stage, note, words = (page.locator(x).bounding_box()["y"] for x in ("#stage", "#inspect", "#words"))
        assert stage < note < words, "on a phone it is told beside what was tapped"


def test_every_search_can_be_shown_at_a_phones_width(visit):
    page = visit(390, 844)
    count = page.evaluate("""() => {
        let count = 0;
        for (const [t, text] of data.texts.entries()) for (const q of text.queries.keys())
          for (const h of data.heads.keys()) for (let w = 0; w <= data.group; w++)
            for (const n of data.nodes.keys()) {
              Object.assign(state, {text: t, query: q, head: h, way: w, nodes: n, step: 99, block: null});
              if ((t + q + h + w + 2 * n) % 8) continue; // an eighth, of all kinds
              choose();
              for (let i = S.steps.length - 1; i >= 0; i -= i > 3 ? 3 : 1) {
                go(i);
                const wide = document.documentElement.scrollWidth, said = $("words").textContent;
                const shown = said + $("stage").innerHTML + $("shares").textContent;
                if (wide > innerWidth || /NaN|undefined|null/.test(shown))
                  throw Error(`${location.hash}: ${wide} wide, ${said}`);
                count++;
              }
            }
        return count;
      }""")
    assert count > 400


def test_a_wrong_address_opens_the_first_search(visit):
    for at in ("#", "#nonsense", "#9.9.9.9.9.9", "#1.2.3", "#0.0.0.0.0.-1"):
        assert visit(1280, 900, at).inner_text("#count") == "1 / 12"
