"""What `kubectl kustomize` makes of docker/kubernetes, as far as it is used there: an unknown field is an error."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

Documents = list[dict[str, Any]]
FIELDS = {
    *("apiVersion", "kind", "resources", "components", "labels", "images", "patches", "replacements"),
    *("configMapGenerator", "generatorOptions"),
}


def build(folder: Path, below: Documents | None = None) -> Documents:
    """The manifests of a layer; below: of the layers under a component."""
    layer = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(layer) <= FIELDS, set(layer) - FIELDS
    found = copy.deepcopy(below or [])
    for name in layer.get("resources", []):
        place = folder / name
        found += build(place.resolve()) if place.is_dir() else _read(place)
    for component in layer.get("components", []):
        found = build((folder / component).resolve(), found)
    for made in layer.get("configMapGenerator", []):
        data = {name: (folder / name).read_text() for name in made["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    for patch in layer.get("patches", []):
        found = _patched(found, patch, folder)
    for labels in layer.get("labels", []):
        for document in found:
            document["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for image in layer.get("images", []):
        for document in found:
            _tag(document, image)
    for replacement in layer.get("replacements", []):
        source = _only(found, replacement["source"])
        assert replacement["source"]["fieldPath"] == "spec"
        for target in replacement["targets"]:
            assert target["fieldPaths"] == ["spec.rayClusterSpec"]
            _only(found, target["select"])["spec"]["rayClusterSpec"] = copy.deepcopy(source["spec"])
    return found


def _read(path: Path) -> Documents:
    # Through JSON: what aliases share in YAML is each its own afterwards.
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(path.read_text())]


def _only(found: Documents, wanted: dict[str, Any]) -> dict[str, Any]:
    (one,) = [d for d in found if (d["kind"], d["metadata"]["name"]) == (wanted["kind"], wanted["name"])]
    return one


def _patched(found: Documents, patch: dict[str, Any], folder: Path) -> Documents:
    if "path" in patch:
        for step in yaml.safe_load((folder / patch["path"]).read_text()):
            assert step["op"] == "add" and step["path"].endswith("/-")
            at: Any = _only(found, patch["target"])
            for key in step["path"].split("/")[1:-1]:
                at = at[int(key)] if isinstance(at, list) else at[key]
            at.append(step["value"])
        return found
    gone = yaml.safe_load(patch["patch"])
    assert gone.pop("$patch") == "delete"
    one = _only(found, {"kind": gone["kind"], "name": gone["metadata"]["name"]})
    return [document for document in found if document is not one]


def _tag(value: Any, image: dict[str, str]) -> None:
    if isinstance(value, list):
        for item in value:
            _tag(item, image)
    elif isinstance(value, dict):
        for container in value.get("containers", []) if isinstance(value.get("containers"), list) else []:
            if container.get("image", "").split(":")[0] == image["name"]:
                container["image"] = f"{image['name']}:{image['newTag']}"
        for item in value.values():
            _tag(item, image)
