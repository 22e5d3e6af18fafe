"""Files and tables that a run produces, from the plain data of `schema`.

This package draws and writes; it computes nothing.
"""

from pqf_jax.report.html import write_html as write_html
from pqf_jax.report.packed import write_inspection as write_inspection
from pqf_jax.report.records import append_metric as append_metric
from pqf_jax.report.records import plain as plain
from pqf_jax.report.records import read_metrics as read_metrics
from pqf_jax.report.records import resume_metrics as resume_metrics
from pqf_jax.report.records import write_json as write_json
from pqf_jax.report.tables import closing_table as closing_table
from pqf_jax.report.tables import permutation_table as permutation_table
from pqf_jax.report.tables import plan_table as plan_table
from pqf_jax.report.tensorboard import TensorBoardWriter as TensorBoardWriter
