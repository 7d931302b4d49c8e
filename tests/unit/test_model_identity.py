# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Which weights: equal weights share a name, other weights never do."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ascend_direct import model_identity
from ascend_direct.errors import ConfigError
from ascend_direct.model_identity import MODEL_FIELDS, identify_model, model_fields

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "_name_or_path": "/somewhere",
    "hidden_size": 64,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
}
LONG_AGO_S = 1_700_000_000


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def make_model(path: Path, **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model-00001.safetensors").write_bytes(bytes(range(256)) * 16)
    (path / "model-00002.safetensors").write_bytes(bytes(1000))
    settle(path)
    return path


def settle(path: Path) -> None:
    """Date the files back: the digests of fresh ones are not kept."""
    for file in path.iterdir():
        os.utime(file, (LONG_AGO_S, LONG_AGO_S))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def fields(model: Path, **args: Any) -> dict[str, str]:
    return model_fields({"model_path": str(model), **args})


class TestANameGivenByTheOperator:
    def test_is_trusted_and_no_file_is_read(self) -> None:
        assert identify_model("/absent", model_id="qwen3-8b r7") == "id:qwen3-8b r7"

    def test_keeps_other_options_in_the_fields(self) -> None:
        one = model_fields({"model_path": "/a", "dtype": "bfloat16"}, model_id="m")
        other = model_fields({"model_path": "/b", "dtype": "float16"}, model_id="m")
        assert one["model"] == other["model"]
        assert one != other


class TestHuggingFaceModels:
    def test_a_snapshot_directory_names_repository_and_commit(self, tmp_path: Path) -> None:
        path = tmp_path / "models--org--some--name" / "snapshots" / COMMIT
        make_model(path)
        assert identify_model(f"{path}/") == f"hf:org/some/name@{COMMIT}"

    def test_a_link_to_a_snapshot_is_the_snapshot(self, tmp_path: Path) -> None:
        path = make_model(tmp_path / "models--org--name" / "snapshots" / COMMIT)
        (tmp_path / "link").symlink_to(path)
        assert identify_model(str(tmp_path / "link")) == f"hf:org/name@{COMMIT}"

    def test_a_repository_is_looked_up_in_the_cache(self, cache_home: Path) -> None:
        refs = cache_home / "huggingface" / "hub" / "models--org--name" / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(COMMIT)
        assert identify_model("org/name") == f"hf:org/name@{COMMIT}"

    def test_a_download_directory_comes_first(self, tmp_path: Path) -> None:
        refs = tmp_path / "downloads" / "models--org--name" / "refs"
        refs.mkdir(parents=True)
        (refs / "v1").write_text(COMMIT)
        identity = identify_model(
            "org/name", revision="v1", download_dir=str(tmp_path / "downloads")
        )
        assert identity == f"hf:org/name@{COMMIT}"

    def test_a_commit_needs_no_cache(self) -> None:
        assert identify_model("org/name", revision=COMMIT) == f"hf:org/name@{COMMIT}"


class TestWeightFiles:
    @pytest.mark.parametrize("mode", ["full", "sampled"])
    def test_equal_weights_at_two_paths_share_a_name(
        self, model: Path, tmp_path: Path, mode: str
    ) -> None:
        shutil.copytree(model, tmp_path / "copy")
        assert identify_model(str(model), "", mode) == identify_model(
            str(tmp_path / "copy"), "", mode
        )

    def test_the_two_modes_never_share_a_name(self, model: Path) -> None:
        assert identify_model(str(model), "", "full") != identify_model(str(model), "", "sampled")

    @pytest.mark.parametrize("at", [0, 2000, 4095])
    @pytest.mark.parametrize("mode", ["full", "sampled"])
    def test_one_other_byte_is_another_model(self, model: Path, at: int, mode: str) -> None:
        before = identify_model(str(model), "", mode)
        flip(model / "model-00001.safetensors", at)
        assert identify_model(str(model), "", mode) != before

    def test_one_other_byte_anywhere_in_a_file_of_many_chunks_is_seen_by_full(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_identity, "_CHUNK_BYTES", 1000)
        monkeypatch.setattr(model_identity, "_READ_BYTES", 300)
        names = set()
        for at in (0, 999, 1000, 2999, 3000, 4095):
            flip(model / "model-00001.safetensors", at)
            names.add(identify_model(str(model)))
        assert len(names) == 6

    def test_sampling_reads_header_tail_and_many_windows_of_a_large_file(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_identity, "_WHOLE_BYTES", 1)
        monkeypatch.setattr(model_identity, "_HEADER_BYTES", 100)
        monkeypatch.setattr(model_identity, "_WINDOWS", 8)
        monkeypatch.setattr(model_identity, "_WINDOW_BYTES", 16)
        (model / "model-00002.safetensors").unlink()
        before = identify_model(str(model), "", "sampled")
        for at, seen in ((99, True), (4095, True), (4080, True), (300, False)):
            flip(model / "model-00001.safetensors", at)
            assert (identify_model(str(model), "", "sampled") != before) is seen
            flip(model / "model-00001.safetensors", at)

    @pytest.mark.parametrize("name", ["_name_or_path", "transformers_version"])
    def test_configuration_that_changes_no_byte_does_not_count(
        self, model: Path, tmp_path: Path, name: str
    ) -> None:
        other = make_model(tmp_path / "other", **{name: "x"})
        assert identify_model(str(model)) == identify_model(str(other))

    @pytest.mark.parametrize("name", ["rope_theta", "torch_dtype", "new_field"])
    def test_any_other_configuration_counts(self, model: Path, tmp_path: Path, name: str) -> None:
        other = make_model(tmp_path / "other", **{name: "x"})
        assert identify_model(str(model)) != identify_model(str(other))

    def test_quantisation_files_and_model_code_count_but_the_tokenizer_does_not(
        self, model: Path
    ) -> None:
        names = [identify_model(str(model))]
        (model / "tokenizer.json").write_text('{"other": 1}')
        names.append(identify_model(str(model)))
        (model / "quantize_config.json").write_text('{"bits": 4}')
        names.append(identify_model(str(model)))
        (model / "modeling.py").write_text("pass")
        names.append(identify_model(str(model)))
        (model / "notes.json").write_text("not JSON")
        names.append(identify_model(str(model)))
        assert names[0] == names[1]
        assert len(set(names)) == 4

    def test_a_single_file_is_a_model(self, model: Path, tmp_path: Path) -> None:
        one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
        for file in (one, other):
            file.write_bytes(b"gguf")
        assert identify_model(str(one)) == identify_model(str(other))
        flip(other, 0)
        assert identify_model(str(one)) != identify_model(str(other))

    def test_progress_is_reported(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(model_identity, "_PROGRESS_S", -1.0)
        with caplog.at_level(logging.INFO):
            identify_model(str(model))
        assert "weights fingerprint: 0/0 MiB" in caplog.text


class TestTheDigestCache:
    def forbid_reading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> bytes:
            raise OSError("read again")

        monkeypatch.setattr(model_identity, "_hash_window", refuse)

    def test_spares_reading_unchanged_files(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = identify_model(str(model))
        self.forbid_reading(monkeypatch)
        assert identify_model(str(model)) == before

    def test_forgets_a_file_with_another_time(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identify_model(str(model))
        os.utime(model / "model-00002.safetensors", (LONG_AGO_S, LONG_AGO_S + 1))
        self.forbid_reading(monkeypatch)
        with pytest.raises(ConfigError, match="read again"):
            identify_model(str(model))

    def test_does_not_keep_files_that_were_just_written(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for file in model.iterdir():
            os.utime(file)
        identify_model(str(model))
        self.forbid_reading(monkeypatch)
        with pytest.raises(ConfigError, match="read again"):
            identify_model(str(model))

    def test_keeps_the_modes_apart(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        identify_model(str(model), "", "sampled")
        self.forbid_reading(monkeypatch)
        with pytest.raises(ConfigError, match="read again"):
            identify_model(str(model), "", "full")

    @pytest.mark.parametrize("content", ["{", "[]", '{"key": 5}', '{"key": "short"}', "\x00"])
    def test_is_ignored_when_damaged(self, model: Path, cache_home: Path, content: str) -> None:
        before = identify_model(str(model))
        (cache_home / "ascend_direct" / "fingerprints.json").write_text(content)
        assert identify_model(str(model)) == before

    def test_may_be_unwritable(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = identify_model(str(model))
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert identify_model(str(model)) == before

    def test_leaves_no_temporary_file(self, model: Path, cache_home: Path) -> None:
        identify_model(str(model))
        names = [file.name for file in (cache_home / "ascend_direct").iterdir()]
        assert names == ["fingerprints.json"]


class TestModelsThatCannotBeTold:
    @pytest.mark.parametrize("path", ["/no/such/model", "s3://bucket/model", "org/name", "plain"])
    def test_say_to_set_model_id(self, path: str) -> None:
        with pytest.raises(ConfigError, match="name them with model_id"):
            identify_model(path)

    def test_a_directory_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="no weight files"):
            identify_model(str(tmp_path))

    def test_a_file_that_changes_while_it_is_read(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        honest = model_identity._hash_window

        def meddle(file: Path, offset: int, length: int) -> bytes:
            os.utime(file)
            return honest(file, offset, length)

        monkeypatch.setattr(model_identity, "_hash_window", meddle)
        with pytest.raises(ConfigError, match="changed while being read"):
            identify_model(str(model))

    @pytest.mark.parametrize(
        "args",
        [
            {"load_format": "remote_instance"},
            {"load_format": "presharded"},
            {"custom_weight_loader": ["package.load"]},
            {"kt_weight_path": "/elsewhere"},
            {"weight_cache_mode": "client"},
        ],
    )
    def test_weights_from_elsewhere_need_a_name(self, model: Path, args: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="brings other weights"):
            fields(model, **args)
        assert model_fields({"model_path": str(model), **args}, model_id="m")["model"] == "id:m"


class TestFields:
    def test_every_named_option_can_be_absent(self, model: Path) -> None:
        assert set(fields(model)) <= {*MODEL_FIELDS, "model"}

    @pytest.mark.parametrize(
        ("name", "one", "other"),
        [
            ("dtype", "bfloat16", "float16"),
            ("quantization", None, "fp8"),
            ("quantization", None, "None"),
            ("kv_cache_dtype", "auto", "fp8_e4m3"),
            ("json_model_override_args", "{}", '{"rope_theta": 5}'),
            ("context_length", None, 4096),
            ("load_format", "auto", "pt"),
            ("weight_version", "default", "7"),
            ("mm_process_config", {}, {"image": {"max_pixels": 5}}),
            ("trust_mm_content_hashes", False, True),
        ],
    )
    def test_another_value_is_another_model(
        self, model: Path, name: str, one: Any, other: Any
    ) -> None:
        assert fields(model, **{name: one}) != fields(model, **{name: other})

    def test_json_counts_by_content(self, model: Path) -> None:
        one = fields(model, json_model_override_args='{"a": 1, "b": 2}')
        assert one == fields(model, json_model_override_args='{"b":2,"a":1}')

    def test_paths_do_not_count(self, model: Path, tmp_path: Path) -> None:
        shutil.copytree(model, tmp_path / "copy")
        assert fields(model) == fields(tmp_path / "copy", download_dir="/elsewhere")

    def test_seed_and_tp_size_count_for_random_weights_only(self, model: Path) -> None:
        for name in ("random_seed", "tp_size"):
            real = [fields(model, **{name: n}) for n in (1, 2)]
            dummy = [fields(model, load_format="dummy", **{name: n}) for n in (1, 2)]
            assert real[0] == real[1]
            assert dummy[0] != dummy[1]

    def test_random_weights_need_no_weight_files(self, model: Path) -> None:
        for file in model.glob("*.safetensors"):
            file.unlink()
        assert fields(model, load_format="dummy")["model"].startswith("weights:config:")

    def test_kv_scales_count_by_content(self, model: Path, tmp_path: Path) -> None:
        names = []
        for number, content in enumerate(("a", "a", "b")):
            file = tmp_path / f"scales{number}.json"
            file.write_text(content)
            names.append(fields(model, quantization_param_path=str(file)))
        assert names[0] == names[1] != names[2]

    def test_adapters_count_by_content_in_every_form_sglang_takes(
        self, model: Path, tmp_path: Path
    ) -> None:
        class Ref:
            lora_path = str(tmp_path / "adapter")

        make_model(tmp_path / "adapter")
        path = str(tmp_path / "adapter")
        forms: list[Any] = [
            [path],
            [f"name={path}"],
            [{"lora_name": "name", "lora_path": path}],
            {"name": path},
            [Ref()],
        ]
        named = [fields(model, lora_paths=form) for form in forms]
        assert all(name == named[0] for name in named)
        assert named[0] != fields(model)
        flip(tmp_path / "adapter" / "model-00001.safetensors", 5)
        assert fields(model, lora_paths=[path]) != named[0]

    @pytest.mark.sglang
    def test_all_exist_in_sglang(self) -> None:
        spec = importlib.util.find_spec("sglang")
        assert spec is not None
        assert spec.submodule_search_locations
        sources = Path(spec.submodule_search_locations[0]) / "srt" / "arg_groups" / "fields"
        declared = {
            name
            for file in sources.glob("*.py")
            for name in re.findall(r"^    (\w+): A\[", file.read_text(), re.MULTILINE)
        }
        assert set(MODEL_FIELDS) <= declared
