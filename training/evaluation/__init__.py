"""What frozen features are worth: k-NN, linear and logistic probes, retrieval, segmentation; more by `Probe`."""

from training.evaluation.encoders import BackboneEncoder, Encoder, PixelEncoder
from training.evaluation.labelled import LabelledSet, read_labelled
from training.evaluation.probes import PROBES, Features, Probe, Task, evaluate, knn_accuracy

__all__ = [
    "PROBES",
    "BackboneEncoder",
    "Encoder",
    "Features",
    "LabelledSet",
    "PixelEncoder",
    "Probe",
    "Task",
    "evaluate",
    "knn_accuracy",
    "read_labelled",
]
