"""How the log writes the metrics of sparse training."""

from image_classification.log.records import COUNT, SHARE, Formats

FORMATS: Formats = {
    "sparse.sparsity": SHARE,
    "sparse.drop_fraction": SHARE,
    "sparse.exploration_rate": SHARE,
    "sparse.sent_ratio": SHARE,
    "sparse.training_ratio": SHARE,
    "sparse.inference_ratio": SHARE,
    "sparse.dropped": COUNT,
    "sparse.grown": COUNT,
}
