"""Names of the metrics of answers, for configs, tables and curves; without other imports."""

from __future__ import annotations

# Metrics of one answer from 0 to 1, by the names in `generation.metrics`, as tables and curves call them.
ANSWER_METRICS = {
    "exact_match": "exact match",
    "contains": "contains",
    "number": "number",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "json_valid": "valid JSON",
}
