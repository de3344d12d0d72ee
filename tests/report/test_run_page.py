"""`whet report`: what a run folder holds, on one page; folders that are still being written."""

import json
import re

import pytest

from whet.cli import main
from whet.report.run_page import MOST_POINTS, page, read_run

PROMPT = "<user>\nWhat is 2 < 3?"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder, steps=30, base="", scale=1.0):
    folder.mkdir()
    (folder / "config.toml").write_text(f'lr = {scale}\nmodel = "{base}"\n')
    (folder / "run.json").write_text(json.dumps({"command": "sft", "whet": "0.1.0"}))
    metrics, timing = [], []
    for step in range(1, steps + 1):
        metrics.append({"step": step, "train_loss": scale / step, "lr": 1e-5, "grad_norm": 1.0})
        timing.append({"step": step, "seconds": 0.5, "tokens_per_s": 1e3, "memory_gb": 2.0})
        if step % 10 == 0:
            dev = {"dev_loss": 2 * scale / step, "dev_stop_probability": 0.5}
            dev |= {"dev_loss/source/a.jsonl": 1.0, "dev_loss/source/b.jsonl": 2.0}
            metrics.append({"step": step, **dev})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "timing.jsonl", timing)
    sample = {"prompt": PROMPT, "expected": "yes"}
    replies = [{"step": step, "reply": f"reply <b>{step}</b>", **sample} for step in (10, 20, 30)]
    write_lines(folder / "samples.jsonl", replies)
    (folder / "incidents").mkdir()
    incident = {"step": 7, "reason": "the loss is nan", "replay": "whet replay x --step 7"}
    (folder / "incidents/step_00000007.json").write_text(json.dumps(incident))
    known = {"stage": "sft", "base": base, "data": "rows.h5", "metrics": {"step": steps}}
    (folder / "whet.json").write_text(json.dumps(known))
    return folder


def test_everything_of_a_run_is_on_its_page(tmp_path, capsys):
    base = write_run(tmp_path / "base")
    run = write_run(tmp_path / "sft", base=str(base))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    titles = re.findall(r"<figcaption>(.*?)<", text)
    assert titles[:4] == ["Loss", "Dev loss by source", "Stop token", "Learning rate"]
    assert titles[4:] == ["Gradient norm", "Speed", "Memory"]
    assert re.search(r"30</td>.*?15 s</td>.*?0.0333</td>.*?0.0667</td>.*?finished", text)
    assert "reply &lt;b&gt;30&lt;/b&gt;" in text
    assert "the loss is nan" in text
    assert text.count(f">{base}<") >= 2, "the base is an ancestor with a row of its own"
    assert "http" not in re.sub(r'http-equiv="[\w-]+"', "", text), "nothing is asked of a network"


def test_the_plan_against_what_happened(tmp_path):
    run = write_run(tmp_path / "sft")
    plan = {"memory_gb": 1.6, "seconds_per_step": 0.4, "tokens_per_s": 1250.0}
    about = {"command": "sft", "total_steps": 40, "plan": plan}
    (run / "run.json").write_text(json.dumps(about))
    (run / "whet.json").unlink()  # ten steps are still to come
    text = page([read_run(run)])
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text.partition("The plan against")[2])
    assert cells[:3] == ["1.60 GB", "2.00 GB", "+25 %"]
    assert cells[3:6] == ["0.4 s", "0.5 s", "+25 %"]
    assert cells[6:9] == ["1,250", "1,000", "-20 %"]
    assert cells[9:12] == ["16 s", "20 s", "+25 %"]
    assert "30 of 40" in text
    assert "not finished, 5 s of steps left" in text


def drawn(folder, key, values):
    """The page of a run that has logged only these."""
    folder.mkdir()
    write_lines(
        folder / "metrics.jsonl",
        [{"step": i, "train_loss": "nan", key: value} for i, value in enumerate(values, 1)],
    )
    return page([read_run(folder)])


def test_neighbouring_ticks_are_written_differently(tmp_path):
    text = drawn(tmp_path / "run", "kl", [18_000.0, 25_500.0, 21_000.0])
    ticks = re.findall(r'text-anchor="end">([\d.,e-]+)</text>', text)[:-1]
    assert len(ticks) >= 3
    assert len(set(ticks)) == len(ticks)
    assert "<b>21,000</b>" in text
    assert 'aria-label="kl; last: train 21,000"' in text
    assert "<title>train, step 2: 25500</title>" in text
    assert re.findall(r'text-anchor="(?:start|middle|end)">(\d)</text>', text) == ["1", "2", "3"]


def test_several_runs_side_by_side(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", scale=2.0)
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(two), "--html", str(out)]) == 0
    text = out.read_text()
    assert all(name in text for name in ("one train", "two dev", "Settings that differ"))
    assert not (one / "report.html").exists()


def test_a_folder_that_is_being_written(tmp_path):
    run = write_run(tmp_path / "sft")
    (run / "whet.json").unlink()
    (run / "timing.jsonl").unlink()
    (run / "incidents/step_00000009.json").write_text('{"step": 9, "rea')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "train_loss": "nan"}\n[]\n{"step": 32, "train_lo')
    found = read_run(run)
    assert (found.step, found.finished) == (31, False)
    assert len(found.points("train_loss")) == 30
    assert "not finished" in page([found])
    (run / "metrics.jsonl").unlink()
    assert "<polyline" not in page([read_run(run)])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no directory" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["kl", "grad_norm"])  # the second one's scale is logarithmic
@pytest.mark.parametrize("values", [[0.0], [1.0] * 9, [-3.0, 5.0], [1e-9, 1e9], range(20_000)])
def test_curves_of_any_size_and_range(tmp_path, values, key):
    text = drawn(tmp_path / "run", key, [float(value) for value in values])
    places = re.findall(r"[\d.-]+", " ".join(re.findall('polyline.* points="(.*?)"', text)))
    assert len(places) < 4 * MOST_POINTS + 100
    assert all(-1 <= float(place) <= 401 for place in places)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_the_page_in_a_browser(browser, tmp_path, width, scheme):
    run = write_run(tmp_path / "sft")
    main(["report", str(run)])
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    tab, errors = context.new_page(), []
    tab.on("console", lambda message: errors.append(message.text))
    tab.goto((run / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    label = tab.locator("figure > svg text").first
    assert label.bounding_box()["height"] >= 10, "letters that can be read"
    assert errors == []
    context.close()


def test_a_measure_has_one_figure_with_its_interval_and_sources(tmp_path):
    step = {"step": 1, "train_loss": 1.0, "reward": 0.1, "pairs": 2}
    dev = {"step": 1, "dev_reward": 0.3, "dev_accuracy": 0.5, "dev_low": 0.2, "dev_high": 0.8}
    dev["dev_accuracy/source/a"] = 0.5
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(step)}\n{json.dumps(dev)}\n")
    (tmp_path / "run.json").write_text('{"command": "grpo"}')
    text = page([read_run(tmp_path)])
    titles = re.findall(r"<figcaption>(.*?)<", text)
    assert titles == ["Loss", "reward", "accuracy", "pairs"]
    assert "its level means nothing" in text
    for words in ("last: train 0.1, dev 0.3", "dev 0.5, dev low 0.2, dev high 0.8, a 0.5"):
        assert words in text
    assert "best dev reward" in text
    answers = {"step": 1, "gsm8k_accuracy": 0.5, "gsm8k_low": 0.25, "gsm8k_high": 0.75}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(answers | dev)}\n")
    text = page([read_run(tmp_path)])
    assert "gsm8k accuracy; last: problems 0.5, problems low 0.25, problems high 0.75" in text, (
        "not of the training data"
    )
    beside = page([read_run(tmp_path), read_run(write_run(tmp_path / "sft"))])
    assert "best dev loss or dev reward" in beside, "of the other run it is a loss"
