"""Every topic notebook runs from its own folder, as papermill and JupyterLab start it."""

from pathlib import Path

import papermill
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_topic_notebook_runs(notebook):
    papermill.execute_notebook(notebook, f"{notebook.stem}-out.ipynb", cwd=str(notebook.parent), progress_bar=False)
