"""Pipelines on the hub, of which the tests have a small stand-in, and in the hands of `DiffusionPipeline` itself."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from conftest import random_embeddings, tiny_features
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import constants
from test_habits import CLASSES, EXACT, build, generate

from latent_dmmd import LatentDMMDInpaintPipeline, LatentDMMDPipeline
from latent_dmmd.latent_pipeline import ASSETS, bundled_pipelines
from latent_dmmd.pipeline import LatentSchedulerPipeline, load_pipeline, read_index


class Hub(BaseHTTPRequestHandler):
    """The end points of the hub that uploading and downloading use, for one revision of each repository."""

    def answer(self, content: bytes, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, answer):
        self.answer(json.dumps(answer).encode(), Content_Type="application/json")

    def missing(self, code):
        self.answer(b"", 404, X_Error_Code=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parts = urlsplit(self.path).path.split("/")[2:]
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer_json({"url": f"{constants.ENDPOINT}/{name}"})
        if parts == ["validate-yaml"]:
            return self.answer_json({"warnings": []})
        name = "/".join(parts[1:3])
        files = self.server.repositories[name]
        if parts[3] == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer_json({"files": [{"path": f["path"], **how} for f in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):  # a commit
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer_json({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{sha(files)}", "commitOid": sha(files)})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.missing("RepoNotFound")
        if api and rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in files.items()]
            return self.answer_json(entries)
        if api:
            siblings = [{"rfilename": p} for p in files]
            return self.answer_json({"id": f"{owner}/{name}", "sha": sha(files), "siblings": siblings, "tags": []})
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.missing("EntryNotFound")
        self.answer(content, ETag=f'"{oid(content)}"', X_Repo_Commit=sha(files))

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def oid(content):
    return hashlib.sha1(content).hexdigest()


def sha(files):
    return oid("".join(f"{path}{oid(content)}" for path, content in sorted(files.items())).encode())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Repositories of an empty hub, by name, each a dictionary of files; the cache is the test's own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    yield server.repositories
    server.shutdown()
    server.server_close()


@pytest.fixture
def trusted(monkeypatch, tmp_path):
    """A folder of its own for the modules that diffusers copies."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_is_pushed_loads_back(cls, hub, trusted, tmp_path):
    pipe = build(cls)
    expected = generate(pipe)
    pipe.push_to_hub("user/pushed")
    pipe.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="user/saved")
    for name in ("user/pushed", "user/saved"):
        torch.testing.assert_close(generate(cls.from_pretrained(name)), expected, **EXACT)
    loaded = DiffusionPipeline.from_pretrained("user/pushed", trust_remote_code=True)
    assert type(loaded) is cls
    torch.testing.assert_close(generate(loaded), expected, **EXACT)


@pytest.mark.parametrize("cls", [LatentDMMDPipeline, LatentSchedulerPipeline], ids=lambda cls: cls.__name__)
def test_load_pipeline_takes_names_on_the_hub(cls, hub, monkeypatch):
    pipe = build(cls)
    pipe.push_to_hub("user/pushed", variant="fp16")
    pipe.push_to_hub("user/pushed")
    assert read_index("user/pushed")["_class_name"] == cls.__name__
    torch.testing.assert_close(generate(load_pipeline("user/pushed")), generate(pipe), **EXACT)
    half = cls.from_pretrained("user/pushed", variant="fp16", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    if not hasattr(pipeline_utils, "get_cached_repo_tree"):
        return  # older versions of diffusers need the hub for what is in the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(generate(load_pipeline("user/pushed")), generate(pipe), **EXACT)


def test_the_model_card_travels(hub, tmp_path, monkeypatch):
    """The licence is in it. A README in the working directory is none."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# something else")
    pipe = build(LatentDMMDPipeline)
    pipe.push_to_hub("user/new")
    assert b"something else" not in hub["user/new"]["README.md"] and b"diffusers" in hub["user/new"]["README.md"]
    pipe.save_pretrained("saved")
    Path("saved/README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# My card")
    LatentDMMDPipeline.from_pretrained("saved").push_to_hub("user/new")
    card = hub["user/new"]["README.md"].decode()
    assert "license: cc-by-nc-sa-4.0" in card and "library_name: diffusers" in card and "# My card" in card


def test_names_that_are_not_on_the_hub_are_told_the_bundled_ones(hub, monkeypatch):
    hub["user/other"] = {"README.md": b"a model"}
    names = ["user/nothing", "user/other", "elpv-dmd", "a/b/c", "/nowhere/pipeline"]
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for name in names:
            with pytest.raises(ValueError, match=f"no pipeline in {name}.*elpv-dmmd") as caught:
                load_pipeline(name)
            assert "\n" not in str(caught.value)


# DiffusionPipeline itself


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_diffusion_pipeline_loads_what_it_is_told_to_trust(cls, trusted, tmp_path):
    pipe = build(cls)
    pipe.save_pretrained(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    for options in ({}, {"custom_pipeline": folder}):
        loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
        assert type(loaded) is cls
        torch.testing.assert_close(generate(loaded), generate(pipe), **EXACT)
    loaded.save_pretrained(tmp_path / "again")
    assert type(cls.from_pretrained(tmp_path / "again")) is cls


def test_our_classes_run_no_code_of_a_folder(tmp_path):
    build(LatentDMMDPipeline).save_pretrained(tmp_path)
    modules = list(tmp_path.rglob("*.py"))
    assert len(modules) == 3
    for path in modules:
        path.write_text("raise SystemExit")
    for cls in (LatentDMMDPipeline, LatentDMMDInpaintPipeline):
        assert type(cls.from_pretrained(tmp_path)) is cls
    assert type(load_pipeline(tmp_path)) is LatentDMMDPipeline


@pytest.mark.parametrize("name", bundled_pipelines())
def test_bundled_pipelines_are_as_saved_ones(name, trusted, tmp_path):
    pipe = load_pipeline(name)
    pipe.save_pretrained(tmp_path)
    bundled = {str(path.relative_to(ASSETS / name)): path.read_text() for path in Path(ASSETS / name).rglob("*.py")}
    assert bundled == {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.py")}
    assert type(DiffusionPipeline.from_pretrained(str(ASSETS / name), trust_remote_code=True)) is type(pipe)


def test_names_of_many_classes_keep_their_order(tmp_path):
    names = [f"class {i}" for i in range(12)]
    net, stored = tiny_features(num_classes=12), random_embeddings(num_classes=12)
    LatentDMMDPipeline(net, stored, class_names=names).save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    index["class_names"] = dict(sorted(index["class_names"].items()))  # "10" before "2"
    path.write_text(json.dumps(index))
    assert (
        read_index(tmp_path)["class_names"] == LatentDMMDPipeline.from_pretrained(tmp_path).config.class_names == names
    )


def test_a_saved_editor_loads_as_the_pipeline_it_edits_with(tmp_path):
    build(LatentDMMDInpaintPipeline).save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path)) is LatentDMMDPipeline


@pytest.mark.parametrize("cls", [LatentDMMDPipeline, LatentSchedulerPipeline], ids=lambda cls: cls.__name__)
def test_indices_with_the_name_of_the_class_alone_load(cls, tmp_path):
    """As 0.1 saved them."""
    pipe = build(cls)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", cls.__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": cls.__name__}))
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    for path in tmp_path.rglob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_pipeline", None)
        path.write_text(json.dumps(config))
    for loaded in (cls.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        torch.testing.assert_close(generate(loaded), generate(pipe), **EXACT)


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.S)


@pytest.mark.parametrize("name", [*bundled_pipelines(), "trained"])
def test_the_snippets_of_a_model_card_run(name, trusted, trained_once):
    folder = trained_once / "pipeline" if name == "trained" else ASSETS / name
    found = snippets((folder / "README.md").read_text())
    assert len(found) == 2
    pipes = []
    for snippet in found:
        scope = {}
        steps = 1 if name.endswith("one-step") else 2
        exec(snippet.replace("THIS_FOLDER", str(folder)).replace("pipe()", f"pipe(num_inference_steps={steps})"), scope)
        pipes.append(scope["pipe"])
    assert type(pipes[0]) is type(pipes[1])


def test_diffusion_pipeline_asks_for_trust(trusted, tmp_path):
    build(LatentDMMDPipeline).save_pretrained(tmp_path)
    try:
        loaded = DiffusionPipeline.from_pretrained(str(tmp_path))
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:  # older versions of diffusers do not ask for a local folder
        assert type(loaded) is LatentDMMDPipeline
