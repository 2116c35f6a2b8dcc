"""Tests of `rlhf merge`: it writes plain weights with the adapter's logits, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.data.collate import pad_right
from rlhf.models import load as loading
from rlhf.models import model_metadata
from rlhf.models.adapters import add_adapter, load_adapter
from rlhf.models.heads import sequence_outputs
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.models.policy import load_causal
from rlhf.models.reward_models import adapted_classifier, load_classifier, load_scorer, new_classifier
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close

IDS = torch.tensor(tiny.rows(4, [14, 14]))
LABELS = ["calm", "kind", "short"]
FORMS = pytest.mark.parametrize("name", tiny.METHODS)


def causal(name: str, sft_folder: str, folder: Path) -> str:
    """Return a trained adapter on an SFT model, as a stage writes it."""
    peft = tiny.METHODS[name]
    return tiny.save(shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM")), folder)


def classifier(name: str, sft_folder: str, folder: Path, *, labels: list[str] | None) -> str:
    """Return a trained adapter with a head: a classifier, or a reward model without labels."""
    renderer, tokenizer = tiny.renderer(), tiny.tokenizer()
    model = new_classifier(
        tiny.source(sft_folder),
        tiny.METHODS[name],
        outputs=len(labels or [0]),
        pad_id=renderer.pad_id,
        vocab_size=len(tokenizer),
        seed=1,
    )
    shake(model).save_pretrained(str(folder))
    more: dict[str, Any] = {"labels": labels, "multi_label": True} if labels else {"score_mean": 0.5, "score_std": 2.0}
    save_tokenizer_and_handover(
        folder, "classify" if labels else "reward", renderer, tokenizer, head_dtype="float32", **more
    )
    return str(folder)


def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.detach()


def outputs(model: Any) -> Tensor:
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), tiny.renderer().pad_id)
    return sequence_outputs(model.eval(), ids, mask).detach()


def refused(call_cli: Any, folder: str, output: Path) -> str:
    """Return the error message, and check that nothing was written."""
    before = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    code, _, err = call_cli(["merge", folder, output])
    assert code == 2
    assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
    return str(err)


@FORMS
def test_transformers_alone_gets_the_adapters_logits(name: str, sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = causal(name, sft_folder, tmp_path / "adapter")
    code, out, err = call_cli(["merge", folder, tmp_path / "plain"])
    assert code == 0, err
    assert "differ from the adapter's by" in out
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "plain"))
    assert not list((tmp_path / "plain").glob("adapter*"))
    wanted = logits(load_adapter(tiny.source(folder), folder, AutoModelForCausalLM, trainable=False))
    assert_close(logits(plain), wanted.tolist())
    assert (wanted - logits(load_causal(tiny.source(sft_folder)))).abs().max() > 0.05
    end = plain.generation_config
    assert (end.eos_token_id, end.pad_token_id) == (tiny.renderer().end_id, tiny.renderer().pad_id)
    assert AutoTokenizer.from_pretrained(str(tmp_path / "plain")).chat_template
    assert model_metadata.read_handover(tmp_path / "plain") == model_metadata.read_handover(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "plain"]
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "adapter").stat().st_mode


@FORMS
def test_a_classifier_keeps_head_and_labels(name: str, sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = classifier(name, sft_folder, tmp_path / "adapter", labels=LABELS)
    code, _, err = call_cli(["merge", folder, tmp_path / "plain", "--quiet"])
    assert code == 0, err
    adapted = adapted_classifier(tiny.source(folder), folder, "classifier", "", trainable=False)
    assert_close(outputs(load_classifier(tiny.source(tmp_path / "plain"))), outputs(adapted).tolist())
    plain = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "plain")).eval()
    ids, mask = pad_right(tiny.rows(4, [5, 12, 9]), tiny.renderer().pad_id)
    theirs = plain(input_ids=ids, attention_mask=mask.long()).logits.detach()
    assert_close(theirs, outputs(adapted).tolist())
    assert [plain.config.id2label[i] for i in range(3)] == LABELS
    assert plain.config.problem_type == "multi_label_classification"
    [head] = [p for n, p in adapted.named_parameters() if "score.modules_to_save.default" in n]
    assert torch.equal(plain.score.weight, head)


def test_a_reward_model_keeps_its_scale_and_is_one_still(sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    folder = classifier("LoRA", sft_folder, tmp_path / "adapter", labels=None)
    code, _, err = call_cli(["merge", folder, tmp_path / "plain"])
    assert code == 0, err
    assert_close(
        outputs(load_scorer(tiny.source(tmp_path / "plain"))), outputs(load_scorer(tiny.source(folder))).tolist()
    )
    record = model_metadata.read_handover(tmp_path / "plain")
    assert record is not None
    assert (record.stage, record.score_mean, record.score_std) == ("reward", 0.5, 2.0)


def test_tokens_that_a_stage_added_come_along(sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    grown = load_causal(tiny.source(sft_folder))
    grown.resize_token_embeddings(len(tiny.tokenizer()) + 3)
    folder = tiny.save(shake(add_adapter(grown, tiny.LORA, "CAUSAL_LM")), tmp_path / "adapter")
    code, _, err = call_cli(["merge", folder, tmp_path / "plain"])
    assert code == 0, err
    assert load_causal(tiny.source(tmp_path / "plain")).get_input_embeddings().weight.shape[0] == 3 + len(
        tiny.tokenizer()
    )


def test_the_end_token_is_the_tokenizers_not_the_bases(sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    """A base model of another source has another stop token than the chat template."""
    shutil.copytree(sft_folder, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 7, "pad_token_id": 8}')
    folder = causal("IA3", str(tmp_path / "base"), tmp_path / "adapter")
    code, _, err = call_cli(["merge", folder, tmp_path / "plain"])
    assert code == 0, err
    end = load_causal(tiny.source(tmp_path / "plain")).generation_config
    assert (end.eos_token_id, end.pad_token_id) == (tiny.renderer().end_id, tiny.renderer().pad_id)


@pytest.mark.parametrize("broken", ["forgotten", "twice", "nan"])
def test_weights_that_compute_something_else_are_not_left_behind(
    broken: str, sft_folder: str, call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    right = LoraModel.merge_and_unload

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        if broken == "forgotten":
            return self.unload()
        layer = self.model.model.layers[0].self_attn.v_proj
        delta = layer.get_delta_weight("default")
        model = right(self, *args, **options)
        weight = model.model.layers[0].self_attn.v_proj.weight
        weight.data += delta if broken == "twice" else torch.nan
        return model

    folder = causal("LoRA", sft_folder, tmp_path / "adapter")
    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    said = refused(call_cli, folder, tmp_path / "plain")
    assert "does not compute the same logits as the adapter" in said
    assert "nothing was written" in said


def test_an_interruption_leaves_nothing(
    sft_folder: str, call_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = causal("LoRA", sft_folder, tmp_path / "adapter")
    original = loading.load_pretrained

    def interrupted(auto_class: Any, source: Any, where: str, **options: Any) -> Any:
        if ".plain." in where:
            raise KeyboardInterrupt
        return original(auto_class, source, where, **options)

    monkeypatch.setattr("rlhf.tools.merge.load_pretrained", interrupted)
    code, _, _ = call_cli(["merge", folder, tmp_path / "plain"])
    assert code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_folded_is_refused_in_words(sft_folder: str, call_cli: Any, tmp_path: Path) -> None:
    folder = causal("LoRA", sft_folder, tmp_path / "adapter")
    (tmp_path / "there").mkdir()
    assert "the output exists" in refused(call_cli, folder, tmp_path / "there")
    assert "no such folder to write into" in refused(call_cli, folder, tmp_path / "no" / "plain")
    assert "there is nothing to merge" in refused(call_cli, sft_folder, tmp_path / "plain")
    assert "no such model" in refused(call_cli, str(tmp_path / "nothing"), tmp_path / "plain")
    soft = add_adapter(load_causal(tiny.source(sft_folder)), tiny.PROMPT, "CAUSAL_LM")
    said = refused(call_cli, tiny.save(soft, tmp_path / "soft"), tmp_path / "plain")
    assert "a soft prompt has no weights to merge" in said
    assert "peft.method=ia3" in said
