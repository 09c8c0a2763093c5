"""The transfer metrics and what they are called, in the order in which tables show them."""

METRICS = {
    "knn_1": "kNN, k = 1", "knn_5": "kNN, k = 5", "knn_20": "kNN, k = 20", "probe": "linear probe",
    "shot_1": "1-shot", "shot_5": "5-shot", "shot_10": "10-shot", "finetune": "fine-tuned",
}  # fmt: skip
"""By the name that results have."""
COLUMN_TITLES = METRICS | {"knn_1": "kNN 1", "knn_5": "kNN 5", "knn_20": "kNN 20", "probe": "probe"}
"""Short, for the columns of a terminal's table."""
