"""Show the metric's page in its Space."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("icone_retrieval"))
