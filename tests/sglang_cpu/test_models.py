# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The small models: the same bytes again, never half a model, never over someone else's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from scripts.sglang_cpu import models
from scripts.sglang_cpu.models import KINDS, ModelError, make_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    first = make_model(tmp_path / "first", kind, layers=2)
    second = make_model(tmp_path / "second", kind, layers=2)
    assert contents(first) == contents(second)


def test_a_second_call_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gqa", layers=1)
    before = (model / "model.safetensors").stat()
    make_model(model, "gqa", layers=1)
    after = (model / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_other_arguments_replace_the_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gqa", layers=1)
    weights = (model / "model.safetensors").read_bytes()
    make_model(model, "gqa", layers=1, seed=1)
    assert (model / "model.safetensors").read_bytes() != weights
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_half_way_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "gqa", layers=1)
    before = contents(model)

    def fail(spec: models.ModelSpec) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(models, "_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(model, "gqa", layers=1, seed=1)
    assert contents(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_swap_brings_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "gqa", layers=1)
    before = contents(model)
    rename = Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if target == model and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(ModelError, match="cannot put the model"):
        make_model(model, "gqa", layers=1, seed=1)
    assert contents(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="choose another path"):
        make_model(tmp_path, "gqa")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"kind": "gpt"}, "unknown kind 'gpt': use one of gqa"),
        ({"kind": "gqa", "size": "huge"}, "unknown size 'huge': use one of tiny"),
        ({"kind": "gqa", "dtype": "int8"}, "unknown dtype 'int8': use one of float32"),
        ({"kind": "gqa", "layers": 0}, "too few"),
        ({"kind": "mlamoe", "layers": 1}, "mlamoe needs 2"),
        ({"kind": "gqa", "hidden": 100}, "multiple of 32"),
        ({"kind": "gqa", "max_positions": 0}, "not positive"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ModelError, match=complaint):
        make_model(tmp_path / "model", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = make_model(tmp_path / "model", "gqa", layers=1)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = "Grüße, 世界!\n\tκαλημέρα  🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == models.VOCAB_SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_fits_and_dtype_and_layers_are_as_asked(tmp_path: Path, kind: str) -> None:
    from safetensors import safe_open

    model = make_model(tmp_path / "model", kind, layers=2, dtype="bfloat16", hidden=64)
    config = json.loads((model / "config.json").read_text())
    assert config["max_position_embeddings"] >= 8192
    with safe_open(str(model / "model.safetensors"), "pt") as weights:
        names = list(weights.keys())
        embedding = weights.get_tensor("model.embed_tokens.weight")
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}
    assert str(embedding.dtype) == "torch.bfloat16"
    assert embedding.shape == (models.VOCAB_SIZE, 64)


def test_a_mistake_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of 32"):
        make_model(tmp_path / "model", "gqa", hidden=33)
