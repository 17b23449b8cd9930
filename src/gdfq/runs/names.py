"""The names of the files in the folder of a run."""

from gdfq.deploy.safetensors import EXAMPLES_FILE as EXAMPLES
from gdfq.deploy.safetensors import STUDENT_FILE

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "EVIDENCE",
    "EVIDENCE_ARRAYS",
    "EXAMPLES",
    "GENERATED",
    "HISTORY",
    "LOCK",
    "METRICS",
    "ONNX_FILE",
    "REPORT",
    "REPORT_NUMBERS",
    "STUDENT_FILE",
]

CONFIG, METRICS, HISTORY = "config.json", "metrics.json", "history.jsonl"
ONNX_FILE = "student.onnx"
CHECKPOINTS, LOCK = "checkpoints", ".lock"
GENERATED = "generated"
EVIDENCE, EVIDENCE_ARRAYS = "evidence.json", "evidence.npz"
REPORT, REPORT_NUMBERS = "report.html", "report.json"
