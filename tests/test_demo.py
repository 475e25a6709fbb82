"""The page to play with: what it draws and shows, without gradio; and the page itself in a browser, where both are."""

import io
import json
import re
import socket
import sys
import threading
import time
import zipfile
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import asked_for, free_port
from PIL import Image
from test_analysis import choices
from test_sampling import random_model

import demo
import sampling
import text
from analysis import live
from analysis.patches import FEW, NOBODY, coloured, expert_colours, load_bars
from analysis.routing import evaluation_times
from autoencoders import PixelSpace
from cli import RunStopped, UsageError
from diffusion import GaussianDiffusion, RectifiedFlow

STEPS = 3


def make_desk(model=None, objective=None, **condition) -> live.Desk:
    model, objective = model or random_model(), objective or RectifiedFlow()
    settings = sampling.Settings(STEPS, objective.samplers[0], 2.0)
    kind = replace(model.config.condition, **condition)
    loaded = sampling.Loaded(model, model, objective, PixelSpace(), 8, Path("tiny"), settings, kind)
    return live.Desk(loaded, demo.get_parser().parse_args(["--ckpt", "tiny"]), "fp32")


def wish(what=("1",), each=2, seeds=(0,), cfg_scale=2.0, steps=STEPS, sampler="euler", **more) -> live.Wish:
    return live.Wish(tuple(what), each, seeds, cfg_scale, steps, sampler, **more)


def drawn(desk: live.Desk, wanted: live.Wish) -> list[live.Sheet]:
    return list(desk.draw(wanted))[-1]


@pytest.fixture(scope="module")
def desk() -> live.Desk:
    return make_desk()


# ------------------------------------------------------------------------------------------------------------ previews


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(RectifiedFlow(shift=2, time_scale=1000), name) for name in RectifiedFlow.samplers]
    + [(GaussianDiffusion(), name) for name in ("ddpm", "ddim", "dpm++")],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_the_last_evaluation_tells_is_the_image(objective, sampler):
    model, heard = random_model(), []
    settings = sampling.Settings(STEPS, sampler, 2.0)
    options = {"on_evaluation": lambda latents: heard.append(sampling.to_pixels(latents))}
    (images,) = sampling.generate(model, objective, PixelSpace(), [0, 3], settings, **options)
    assert len(heard) == len(evaluation_times(model.config, objective, settings))
    assert np.abs(heard[-1].astype(int) - images).max() <= 1
    assert np.abs(heard[0].astype(int) - images).max() > 10
    (plain,) = sampling.generate(model, objective, PixelSpace(), [0, 3], settings)
    assert np.array_equal(plain, images)


def test_a_slow_listener_hears_little_and_holds_up_nothing():
    made = []

    def work(tell):
        for number in range(100):
            tell(lambda number=number: made.append(number) or number)
        return "done"

    with ThreadPoolExecutor(1) as worker:
        words = live.told_by(worker, work, threading.Event(), lambda: "waits")
        assert next(word for word in words if word != "waits") == 0
        worker.submit(lambda: None).result()  # the work is over
        assert list(words) == ["done"] and made == [0]


def test_whoever_stops_listening_ends_the_work():
    reached = []

    def work(tell):
        for number in range(1000):
            reached.append(number)
            tell(lambda: "")
            time.sleep(0.001)

    with ThreadPoolExecutor(1) as worker:
        words = live.told_by(worker, work, threading.Event(), lambda: "waits")
        next(word for word in words if word != "waits")
        words.close()
        worker.submit(lambda: None).result()
        assert 1 <= len(reached) < 1000


# ------------------------------------------------------------------------------------------------------------- drawing


def test_it_draws_what_sample_draws_and_tells_how_far_it_is(desk):
    told = list(desk.draw(wish(what=("1", "3"), seeds=(5, 6))))
    sheets, progress = told.pop(), told
    assert [sheet.seed for sheet in sheets] == [5, 6] and sheets[0].columns == 2
    for sheet in sheets:
        settings = sampling.Settings(STEPS, "euler", 2.0, seed=sheet.seed)
        (images,) = sampling.generate(desk.loaded.model, RectifiedFlow(), PixelSpace(), [1, 1, 3, 3], settings)
        assert np.array_equal(sheet.images, images) and sheet.settings == settings
    progress = [word for word in progress if isinstance(word, live.Progress)]
    assert {word.total for word in progress} == {2 * STEPS} and progress[0].place == 0
    done = [word.done for word in progress]
    assert done == sorted(set(done)) and all(word.images.shape == (4, 8, 8, 3) for word in progress)
    blind = [word for word in desk.draw(wish(preview=False)) if isinstance(word, live.Progress)]
    assert blind and all(word.images is None for word in blind)


def test_which_expert_worked_where_against_a_slow_loop(desk):
    (sheet,) = drawn(desk, wish())
    work, counts = sheet.work, np.zeros_like(sheet.work.counts)
    assert work.times == pytest.approx([1, 2 / 3, 1 / 3]) and sheet.evaluations == STEPS
    seen = choices(desk.loaded.model, RectifiedFlow(), sheet.settings, [1, 1], batch_size=2)
    for image, step, half, layer, patch, _, experts in seen:
        assert (work.experts[image, half, layer, step, patch] - 1).tolist() == list(experts)
        counts[half, layer, step][experts] += 1
    assert np.array_equal(work.counts, counts) and counts.sum() > 0
    place = work.place(1, 9, 9)
    assert place == (1, len(work.layers) - 1, STEPS - 1)
    picture = coloured(sheet.images, work.experts[:, 1, place.layer, -1, :, 1], 4)
    assert np.array_equal(sheet.patches(place, 1)[2:50:6, 52:100:6], picture[1])
    percents = [100 * count / 32 for count in work.counts[place]]
    assert re.findall(r"(\d+) %", work.loads(place)) == [f"{percent:.0f}" for percent in percents]


def test_colours_over_an_image_by_hand():
    rng = np.random.default_rng(0)
    images, experts = rng.integers(0, 256, (2, 12, 12, 3), dtype=np.uint8), rng.integers(0, 6, (2, 9))
    shown = coloured(images, experts, 5)
    for image, row, column in np.ndindex(2, 12, 12):
        expert = experts[image, row // 4 * 3 + column // 4]
        colour = NOBODY if expert == 0 else FEW[expert - 1]
        r, g, b = images[image, row, column].tolist()
        grey = 255 - 0.7 * (255 - (0.299 * r + 0.587 * g + 0.114 * b))
        wanted = [0.7 * int(colour[i : i + 2], 16) + 0.3 * grey for i in (1, 3, 5)]
        assert np.abs(shown[image, row, column] - wanted).max() <= 0.5 + 1e-6
    assert len(set(expert_colours(64))) == 64 and expert_colours(5) == FEW[:5]


def test_bars_are_shares_and_the_line_is_an_even_one():
    page = load_bars([30, 0, 10, 0], tokens=20, top_k=2)  # even: 2/4 of 20; the longest bar, 1.5, is the whole width
    assert re.findall(r"width:([\d.]+)%", page) == ["100.0", "0.0", "33.3", "0.0"]
    assert re.findall(r"left:([\d.]+)%", page) == ["33.3"] * 4
    assert re.findall(r"(\d+) %", page) == ["150", "0", "50", "0"]
    assert re.findall(r"background:(#\w+)", page) == FEW[:4]
    assert "0 %" in load_bars([0, 0], tokens=0, top_k=1)  # a half that was not evaluated


def test_the_archive_holds_images_and_settings(desk):
    wanted = wish(seeds=(0, 7))
    sheets = drawn(desk, wanted)
    with zipfile.ZipFile(io.BytesIO(desk.archive(wanted, sheets))) as archive:
        names = [f"seed{seed}/{name}" for seed in (0, 7) for name in ("000000", "000001", "grid")]
        assert sorted(archive.namelist()) == sorted(
            [f"{name}.png" for name in names] + [f"seed{seed}/settings.json" for seed in (0, 7)]
        )
        image = np.asarray(Image.open(io.BytesIO(archive.read("seed7/000001.png"))))
        assert np.array_equal(image, sheets[1].images[1])
        record = json.loads(archive.read("seed7/settings.json"))
    assert (record["seed"], record["steps"], record["sampler"], record["labels"]) == (7, "3", "euler", [1, 1])


# -------------------------------------------------------------------------------------------------------- on the page


def controls(desk: live.Desk, view=(1, 1, 0, 0), **changed) -> tuple:
    usual = dict(what="1", seed=0, second=1, beside=False, each=2, cfg_scale=2.0, steps=STEPS, sampler="euler")
    return desk, "me", *demo.Asked(**usual | {"preview": True} | changed), *view


def test_what_the_page_is_given(desk):
    *before, (status, stage, sheets, slider) = demo.draw(*controls(desk, view=(9, 1, 0, 0), beside=True))
    before = [told for told in before if "waiting" not in told[0]]
    assert before and all(
        "<progress" in told[0] and "dashed" not in told[1] and told[2:] == (None, None) for told in before
    )
    assert "4 images in" in status and "euler3-cfg2-seed0" in status and "data:application/zip;base64," in status
    assert stage.count("<img") == 4 and stage.count('class="loads"') == 2 and "seed 1" in stage
    assert slider == {"maximum": 3, "value": 3} and stage == demo.show(sheets, 3, 1, 0, 0)
    others = [demo.show(sheets, *view) for view in ((1, 1, 0, 0), (1, 2, 0, 0), (1, 2, 1, 0), (1, 2, 1, 1))]
    assert len({stage, *others}) == 5, "a control changes nothing"
    assert demo.show(None, 1, 1, 0, 0).count("<img") == 0  # nothing is drawn yet
    *_, (_, stage, *_) = demo.draw(*controls(desk, what=demo.FEW, each=1, cfg_scale=1.0, view=(1, 1, 1, 0)))
    assert stage.count("<img") == 2  # no unconditional half: the other one is shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"what": "cat"}, "class label 'cat'"),
        ({"what": "4"}, "class label 4 is not one of the model's classes 0..3"),
        ({"what": ""}, "choose a class, or write a prompt"),
        ({"what": demo.FEW, "each": 17}, "4 x 17 images are more than 64"),
        ({"seed": None}, "its field is empty"),
        ({"sampler": "ddim"}, "'ddim' belongs to the objective 'ddpm'"),
    ],
)
def test_what_is_wrong_is_a_line_of_text(desk, changed, message):
    ((status, *rest),) = demo.draw(*controls(desk, **changed))
    assert 'class="error"' in status and message in status.replace("&#x27;", "'") and rest == [None] * 3


def test_a_broken_network_is_said_and_the_next_drawing_works(desk):
    broken = make_desk(random_model())
    broken.loaded.model.final_layer.linear.bias.data.fill_(torch.nan)
    with pytest.raises(RunStopped, match="NaN or infinity, from evaluation 1 of 3"):
        drawn(broken, wish())
    assert len(drawn(desk, wish())) == 1


def begun(words) -> live.Progress:
    return next(word for word in words if isinstance(word, live.Progress))


def test_drawings_wait_in_line_and_are_cancelled_by_their_owner():
    desk = make_desk()
    first, second, third = (desk.draw(wish(steps=300), owner) for owner in ("a", "b", "c"))
    assert begun(first).total == 300
    assert next(second) == live.Waiting(1) and next(third) == live.Waiting(2)
    desk.cancel("b")
    with pytest.raises(live.Stopped):
        list(second)
    assert next(third) == live.Waiting(1)
    first.close()  # a page that went away
    assert begun(third).total == 300
    desk.cancel("c")
    with pytest.raises(live.Stopped):
        list(third)
    told = demo.draw(*controls(desk, steps=300))
    next(told)
    desk.cancel("me")
    *_, last = told
    assert last == ("<p>cancelled</p>", None, None, None) and desk.line == []
    fourth = desk.draw(wish(steps=300))
    begun(fourth)
    threading.Timer(0.05, desk.close).start()
    with pytest.raises(live.Stopped):
        list(fourth)


def test_dense_models_have_no_panel_and_texts_are_prompts():
    dense = make_desk(random_model(num_experts=0))
    *_, (_, stage, (sheet,), _) = demo.draw(*controls(dense))
    assert sheet.work is None and stage.count("<img") == 1 and "loads" not in stage and not dense.has_experts
    reads = random_model(caption_width=16, caption_length=6)
    reader = make_desk(reads, encode=text.Words(16, 6))
    what = "a seven\n\n a two \n"
    *_, (_, stage, (sheet,), _) = demo.draw(*controls(reader, what=what))
    settings = sheet.settings
    texts = ["a seven", "a seven", "a two", "a two"]
    (images,) = sampling.generate(reads, RectifiedFlow(), PixelSpace(), texts, settings, kind=reader.loaded.condition)
    assert np.array_equal(sheet.images, images) and 'class="loads"' in stage
    assert "prompt" in str(reader.archive(wish(what=("a seven",)), [sheet]))


def test_errors_come_before_gradio(monkeypatch, tmp_path):
    def main(*flags):
        with pytest.raises(UsageError) as error:
            demo.main(demo.get_parser().parse_args(["--device", "cpu", *map(str, flags)]))
        assert "\n" not in str(error.value)
        return str(error.value)

    loaded_before = set(sys.modules)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    missing = "gradio is not installed, which the page needs: pip install -r requirements-demo.txt"
    assert main("--ckpt", tmp_path) == missing
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    assert str(tmp_path / "none") in main("--ckpt", tmp_path / "none", "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen there (Address already" in main("--ckpt", tmp_path, "--port", port)
    assert "--port 70000: cannot listen" in main("--ckpt", tmp_path, "--port", 70000)
    assert ("gradio" in sys.modules) == ("gradio" in loaded_before)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gradio") is None, reason="no gradio here (pip install -r requirements-demo.txt)")
def test_the_page_in_a_browser(desk, browser, monkeypatch):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(name: str, inside: str = ""):
        return browser.find_element(By.CSS_SELECTOR, f"#{name} {inside}")

    def until(condition) -> None:
        WebDriverWait(browser, 60, poll_frequency=0.02).until(lambda _: condition())

    def status() -> str:
        return browser.execute_script("return document.querySelector('#status p').innerText")

    def pictures() -> list[str]:
        return browser.execute_script("return [...document.querySelectorAll('#stage img')].map(i => i.src)")

    def draw() -> list[str]:
        """What is seen once it is drawn."""
        browser.execute_script("document.querySelector('#status p').innerText = ''")
        find("draw").click()
        until(lambda: "images in" in status())
        return pictures()

    def write(name: str, *keys) -> None:
        field = find(name, "input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(*keys)

    address = f"http://127.0.0.1:{(port := free_port())}/"
    page = demo.make_page(desk)
    demo.serve(page, "127.0.0.1", port)
    try:
        browser.get(address)
        until(lambda: browser.find_elements(By.ID, "draw"))
        write("steps", "6", Keys.TAB)
        image, patches = draw()
        assert "euler6-cfg2-seed0" in status() and len(find("stage").find_elements(By.CSS_SELECTOR, ".load")) == 4
        (sheet,) = drawn(desk, wish(what=("0",), each=4, steps=6))
        assert image == demo.data_uri(demo.png_bytes(sheet.grid))
        assert patches == demo.data_uri(demo.png_bytes(sheet.patches(sheet.work.place(0, 0, 0), 0)))
        with zipfile.ZipFile(io.BytesIO(b64decode(find("download").get_attribute("href").partition(",")[2]))) as file:
            assert len(file.namelist()) == 6

        find("evaluation", "input[type=range]").send_keys(Keys.END)
        until(lambda: pictures()[1] != patches)
        assert pictures() == [image, demo.data_uri(demo.png_bytes(sheet.patches(sheet.work.place(0, 0, 5), 0)))]

        write("what", "3", Keys.ENTER)
        find("beside", "input").click()
        seen = draw()
        assert len(seen) == 4 and image not in seen
        write("what", "cat", Keys.ENTER)
        find("draw").click()
        until(lambda: "class label 'cat'" in status())

        write("what", "2", Keys.ENTER)
        write("steps", "250", Keys.TAB)
        evaluated, estimate = [], desk.loaded.objective.estimate
        monkeypatch.setattr(desk.loaded.objective, "estimate", lambda *args: evaluated.append(1) or estimate(*args))
        find("draw").click()
        until(lambda: " of 500" in status() and pictures()[0] != seen[0])  # a preview
        find("cancel").click()
        until(lambda: status() == "cancelled")
        desk.worker.submit(lambda: None).result()  # the drawing is over
        assert status() == "cancelled" and 0 < len(evaluated) < 500
        write("steps", "2", Keys.TAB)
        assert len(draw()) == 4
        assert all(url.startswith(address) for url in asked_for(browser))
    finally:
        page.close(verbose=False)
