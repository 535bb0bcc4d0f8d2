"""What a dry run foretells, against what a run does."""

import sys

import pytest
import small

import tenfold
import tenfold_cli
from tenfold.compression import forecast


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("models") / "dense")


def run(monkeypatch, capsys, model, output, *given) -> str:
    text = str(model / "text.txt")
    arguments = ["compress", str(model), "-o", str(output), "--calibrate", text, "--num-samples", "8", *given]
    monkeypatch.setattr(sys, "argv", ["tenfold", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tenfold_cli.main()
    captured = capsys.readouterr()
    assert not stopped.value.code, captured.err
    return captured.out


@pytest.mark.parametrize("shapes", ["free", "stock"])
def test_one_command_compresses_and_heals_and_a_dry_run_tells_before(monkeypatch, capsys, tmp_path, model, shapes):
    given = ("--keep", "0.8", "--shapes", shapes, "--heal", str(model / "text.txt"), "--heal-tokens", "8.2k")
    given += ("--align", "8") if shapes == "stock" else ()
    out = run(monkeypatch, capsys, model, tmp_path / "out", *given, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert "prune: mlp" in out and "memory: about" in out and "healing" in out and f"{shapes} shapes" in out
    run(monkeypatch, capsys, model, tmp_path / "out", *given)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    after, _ = tenfold.load(tmp_path / "out", "cpu")
    assert hasattr(after.config, "quantization_config") == (shapes == "free")
    report = tenfold.checkpoint_jobs.read_json(tmp_path / "out" / "tenfold.json")
    assert report["heal"]["steps"] == 2  # of 4,096 tokens


def test_matrices_and_times_of_a_forecast(monkeypatch, model):
    monkeypatch.setattr(forecast, "_measure_rate", lambda *given: 2e6)
    found = tenfold.api.forecast(model, "recommended", model / "text.txt", 8)[0]
    by_role = {site["role"]: (site["matrices"], site["parameters"]) for site in found["sites"]}
    assert by_role["mlp.in"] == (2, 2 * 32 * 128) and by_role["attn.qkv"] == (2, 2 * 32 * 96)
    inside, tokens = 2 * 12 * 32 * 32, 8 * 32
    assert found["seconds"]["forward"] == pytest.approx(tokens * inside / 1e6)
    assert found["seconds"]["fits"] == pytest.approx(2.3 * tokens * inside / 1e6)
    whole, stored = (tenfold.inspect(model)["parameters"][key] for key in ("total", "dense"))
    assert found["parameters"] == whole == stored and found["kept"] is None


def test_without_text_the_parameters_are_known(model):
    recipe = {"replace": [{"role": "mlp.in", "structure": {"kind": "low_rank", "rank": 4}}]}
    found = tenfold.api.forecast(model, recipe)[0]
    after, _ = tenfold.compress(model, recipe)
    assert found["kept"] == sum(p.numel() for p in after.parameters()) and not found["seconds"]
