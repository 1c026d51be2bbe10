"""Execute the notebooks from top to bottom, each in a kernel of its own; any exception is an error.

    python notebooks/build.py                     # all of them, outputs written back into the files
    python notebooks/build.py 2_pruning_tree      # some
    python notebooks/build.py --check             # execute, write nothing

What changes from run to run without meaning anything (time stamps, names of the kernel) is taken out; so are
sliders, which only live where a kernel runs.  The page beside the notebooks is made by `build_page.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SLIDERS = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, write: bool) -> None:
    """Run one notebook; CellExecutionError says which cell failed and how."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # no word about its socket on this machine
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    notebook.metadata = METADATA
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if "outputs" in cell:
            cell.outputs = [x for x in cell.outputs if SLIDERS not in x.get("data", {})]
        for output in cell.get("outputs", []):
            if "data" in output:
                output.metadata = {}
    nbformat.validate(notebook)
    if write:
        nbformat.write(notebook, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", metavar="NAME", help="(all)")
    parser.add_argument("--check", action="store_true", help="execute without writing")
    options = parser.parse_args()
    paths = [HERE / f"{Path(name).stem}.ipynb" for name in options.notebooks] or sorted(HERE.glob("*.ipynb"))
    if missing := [path.name for path in paths if not path.exists()]:
        parser.error(f"no such notebook: {missing[0]}")
    # threads that wait without spinning: on a machine with other work HiP is many times faster for it
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for path in paths:
        started = time.monotonic()
        try:
            execute(path, not options.check)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        seconds, size = time.monotonic() - started, path.stat().st_size / 1000
        print(f"{path.name}: {seconds:.0f} s, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
