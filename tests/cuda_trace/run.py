"""Trace cases in this process and write their figures.

python -m tests.cuda_trace.run OUT.json [NAME ...]
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.cuda_trace.stub import load_stub

load_stub()

from tests.cuda_trace.cases import CASES  # noqa: E402 - the stub comes before torch
from tests.cuda_trace.plans import PLANS, WHOLE  # noqa: E402
from tests.cuda_trace.roofline import DEVICES, seconds_by  # noqa: E402


def main(out: Path, names: list[str]) -> None:
    # Else each collection, three per trace, walks the million objects of the imported libraries.
    gc.collect()
    gc.freeze()
    results: dict[str, Any] = {}
    work = CASES | {name: plan.trace for name, plan in (PLANS | WHOLE).items()}
    for name in names or [*CASES, *PLANS]:
        began = time.perf_counter()
        try:
            step = work[name]()
            ideal = {device: seconds_by("phase", step.kernels, rates) for device, rates in DEVICES.items()}
            results[name] = asdict(replace(step, kernels={})) | {"ideal_seconds": ideal}
        except Exception as error:  # noqa: BLE001 - the test of this case shows it
            results[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        results[name]["seconds"] = round(time.perf_counter() - began, 2)
    out.write_text(json.dumps(results, indent=1))


main(Path(sys.argv[1]), sys.argv[2:])
