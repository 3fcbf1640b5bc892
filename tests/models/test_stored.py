"""The files of a model's folder. Those that are made to do harm are in test_hostile.py."""

import json
import socket
import sys

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from minirlhf.errors import UserError
from minirlhf.files.folders import resolve
from minirlhf.models.stored import read_tensors, tensor_files, tensor_names


@pytest.fixture
def folder(tmp_path):
    """A folder with a whole file of two tensors."""
    folder = tmp_path / "own" / "model"
    folder.mkdir(parents=True)
    tensors = {"x": torch.arange(200.0), "y": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")
    return folder


# ---- names: folder or hub ------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_local_folder_never_asks_the_network(no_network, folder, monkeypatch):
    assert resolve(folder) == folder
    monkeypatch.chdir(folder.parent.parent)
    assert str(resolve("own/model")) == "own/model"  # looks like a hub name
    for missing in ("nowhere", "/no/such/folder", "a/b/c"):
        with pytest.raises(UserError, match=r"no such folder: give a model folder or a hub name"):
            resolve(missing)
    with pytest.raises(UserError, match=r"is a file: give the folder that holds config.json"):
        resolve(folder / "model.safetensors")


def test_a_hub_name_without_the_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^own/model: no such folder: .*pip install hugging"):
        resolve("own/model")


def test_a_hub_name_without_a_network_is_one_line(monkeypatch):
    def offline(name, **patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"^own/model: .*\(no cache\): check the path") as caught:
        resolve("own/model")
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_its_download(monkeypatch, folder):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("own/model") == folder
    assert [legal for _, legal, _ in asked] == [["*.json", "*.safetensors", "*.jinja"]]  # no pickle
    assert resolve("own/model", weights=False) == folder
    assert [legal for _, legal, _ in asked[1:]] == [["*.json", "*.jinja"]]
    for _, legal, never in asked:  # the same weights in another layout are never downloaded
        mine = ["config.json", "additional_chat_templates/tool_use.jinja"]
        theirs = ["onnx/config.json", "original/a.safetensors", "awq/b.json", "consolidated.json"]
        chosen = huggingface_hub.utils.filter_repo_objects(
            mine + theirs, allow_patterns=legal, ignore_patterns=never
        )
        assert list(chosen) == mine


# ---- which files count ---------------------------------------------------------------------------


def test_tensors_are_those_of_all_shards_but_the_harmless(folder):
    single = folder / "model.safetensors"
    assert tensor_files(folder) == [single]
    single.unlink()
    shards = {"x": "b.safetensors", "h.0.attn.bias": "a.safetensors", "z": "b.safetensors"}
    index = json.dumps({"weight_map": shards})
    (folder / "model.safetensors.index.json").write_text(index)
    save_file({"x": torch.ones(2), "z": torch.ones(3)}, folder / "b.safetensors")
    save_file({"h.0.attn.bias": torch.ones(1)}, folder / "a.safetensors")
    files = tensor_files(folder)
    assert files == [folder / "b.safetensors", folder / "a.safetensors"]
    assert set(read_tensors(files)) == {"x", "z"}
    assert tensor_names(files) == {"x", "z", "h.0.attn.bias"}
    save_file({"v_head.summary.weight": torch.ones(1, 2)}, folder / "value_head.safetensors")
    assert tensor_files(folder) == [*files, folder / "value_head.safetensors"]


def test_a_tensor_in_two_shards_is_refused(folder):
    first, second = folder / "model.safetensors", folder / "b.safetensors"
    save_file({"y": load_file(first)["y"]}, second)
    with pytest.raises(UserError, match=r"b\.safetensors: 'y' stands in two shards"):
        read_tensors([first, second])


@pytest.mark.parametrize(
    "index, told",
    [
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({"weight_map": {"x": "gone.safetensors"}}, "'x' is in gone.safetensors, which is missing"),
        ({"weight_map": {"x": "../up.safetensors"}}, r"'x' is in '../up.safetensors': shards are"),
        ({"weight_map": {"x": "/up.safetensors"}}, "shards are plain file names"),
        ({"weight_map": {"x": "a\\b.safetensors"}}, "shards are plain file names"),
        ({"weight_map": {"x": "up.safetensors\n"}}, "shards are plain file names"),
        ({"weight_map": {"x": "model.bin"}}, "shards are plain file names"),
        ({"weight_map": {"x": 5}}, "shards are plain file names"),
    ],
)
def test_a_bad_index_is_refused(index, told, folder):
    (folder / "model.safetensors").rename(folder.parent / "up.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=told) as caught:
        tensor_files(folder)
    assert "model.safetensors.index.json" in caught.value.where


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500, -1])
def test_a_truncated_file_is_refused_by_name(size, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    told = r"model.safetensors: not a whole safetensors file"
    with pytest.raises(UserError, match=told):
        read_tensors([path])
    with pytest.raises(UserError, match=told):
        tensor_names([path])


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickle files are not read"):
        tensor_files(folder)
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")  # no weights
    with pytest.raises(UserError, match=r"has no model.safetensors: incomplete download"):
        tensor_files(folder)
