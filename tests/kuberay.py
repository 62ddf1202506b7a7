"""The fields of KubeRay's `ray.io/v1` that the manifests use, and no others: a misspelt key is an error.

No package index carries the definitions of KubeRay, so these were written from its reference; the manifests were also
checked against the definitions of KubeRay 1.7 by hand. Pods are checked by the schemas of Kubernetes itself.
"""

from typing import Any


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
PODS = {"type": "object", "required": ["spec"]}
WORKERS = _object(
    {
        "groupName": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "idleTimeoutSeconds": COUNT,
        "rayStartParams": PARAMETERS,
        "template": PODS,
    },
    "groupName",
    "template",
    "rayStartParams",
)
CLUSTER = _object(
    {
        "rayVersion": {"type": "string", "pattern": r"^2\.\d+\.\d+$"},
        "authOptions": _object({"mode": {"enum": ["token"]}, "secretName": TEXT}, "mode"),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _object(
            {
                "version": {"enum": ["v1", "v2"]},
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": COUNT,
                "securityContext": {"type": "object"},
                "resources": {"type": "object"},
            }
        ),
        "headGroupSpec": _object(
            {"serviceType": {"enum": ["ClusterIP"]}, "rayStartParams": PARAMETERS, "template": PODS},
            "template",
            "rayStartParams",
        ),
        "workerGroupSpecs": {"type": "array", "items": WORKERS, "minItems": 1},
    },
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
)
METADATA = _object({"name": TEXT, "labels": PARAMETERS}, "name")
VERSION = {"const": "ray.io/v1"}
RAY_CLUSTER = _object(
    {"apiVersion": VERSION, "kind": {"const": "RayCluster"}, "metadata": METADATA, "spec": CLUSTER}, "spec", "metadata"
)
RAY_JOB = _object(
    {
        "apiVersion": VERSION,
        "kind": {"const": "RayJob"},
        "metadata": METADATA,
        "spec": _object(
            {
                "entrypoint": TEXT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "backoffLimit": COUNT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
                "rayClusterSpec": CLUSTER,
            },
            "entrypoint",
            "rayClusterSpec",
        ),
    },
    "spec",
    "metadata",
)
SCHEMAS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}
