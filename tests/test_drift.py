"""What training did to the model: beside the game, against PEFT; and merged into it (merge.py)."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import conftest
import drift
import merge
from conftest import (
    ROOT,
    change_json,
    copy_run,
    damaged_model,
    player_of,
    read_json,
    refused,
    run_training,
)
from envs import Condition
from lora import load_adapter
from policy import load_model

WORDINGS = ("choice", "game", "game_state")
BEGINS = [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
BEGINS = {"type": "TemplateProcessing", "single": BEGINS, "pair": BEGINS}
BEGINS["special_tokens"] = {"B": {"id": "B", "ids": [2], "tokens": ["<bos>"]}}  # before each text


def test_drift_is_that_of_the_plain_models(run, tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    begins = damaged_model(tmp_path / "model", lambda _: None)
    change_json(tmp_path / "model" / "tokenizer.json", post_processor=BEGINS)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "tiny"), run)
    said = [player_of(*tiny, Condition(prompt=w), free=True)[..., :2].sum(-1) for w in WORDINGS]
    ids = tiny[1]((ROOT / "experiments" / "prose.txt").read_text())["input_ids"]
    for start, model in (([], "tiny"), ([2], begins)):
        kls, surprise, models = [], [], (tiny[0], tuned)
        for chunk in torch.tensor(ids[: 256 - len(start)]).split(64):
            chunk = torch.cat([torch.tensor(start, dtype=int), chunk])
            p, q = (m(chunk[None]).logits[0, :-1].detach().log_softmax(-1) for m in models)
            kls += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            surprise += (p - q).gather(1, chunk[1:, None])
        seeds = [copy_run(run, tmp_path / f"{model[-4:]}{i}", model=model, seed=i) for i in (1, 2)]
        drift.main([*map(str, seeds), "--json", str(path), "--overwrite"])
        results, printed = read_json(path), capsys.readouterr().out
        expected = [np.mean(kls), np.exp(np.mean(surprise)), np.mean(said)]
        for result in results["runs"]:
            measured = result["drift"]
            kl, perplexity = measured["kl"], measured["perplexity"]
            names, untuned = measured["names"], measured["names_untuned"]
            assert [kl, perplexity, untuned] == pytest.approx(expected, rel=1e-3)
            assert kl > 1e-4 and abs(names - untuned) > 1e-3
        assert "utilitarian (n=2)\n" in printed and f"{kl:.3f}±0.000" in printed


def test_a_run_given_twice_is_refused(run, capsys):
    with refused(capsys, "RUN", "a seed comes twice"):
        drift.main([str(run), str(run)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_plays_as_the_run(dtype, run, tmp_path, capsys):
    folder = tmp_path / "merged"
    if dtype != "float32":
        run = tmp_path / "run"
        options = f"--reward utilitarian --episodes 256 --prompt brief --dtype {dtype}"
        run_training(run, *options.split())
    merge.main([str(run), str(folder)])
    assert "float32" in capsys.readouterr().out
    base, merged = load_model("tiny"), load_model(folder)
    for parameter in base[0].parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    load_adapter(base[0], "agent", run)
    expected = player_of(*base, Condition(), True, "agent")
    assert player_of(*merged, Condition(), True) == pytest.approx(expected, abs=1e-5)
    assert (folder / "model.safetensors").stat().st_size > 4 * merged[0].num_parameters()
    with conftest.refused(capsys, "FOLDER", "exists"):
        merge.main([str(run), str(folder)])
