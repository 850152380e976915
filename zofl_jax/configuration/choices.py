"""What settings can be, where it is one of a few, and what goes with the choices."""

PERTURBATIONS = ("gaussian", "rademacher", "sphere", "low_rank", "subspace")
FACTORED = ("low_rank", "subspace")
"""Perturbations whose models share the products with the params."""

OPTIMIZERS = ("sgd", "adam", "radazo")
ESTIMATORS = ("forward", "central", "projection", "jvp")
PARTITIONS = ("iid", "dirichlet", "shards", "natural")
MASKS = ("none", "random", "magnitude", "sensitivity")
DTYPES = ("float32", "bfloat16", "float16")

CALIBRATION_EXAMPLES = 256
"""Of the sensitivity mask."""

CALIBRATION_TEXTS, CALIBRATION_TOKENS = 64, 128
"""Of a sensitivity mask from public texts: how many, and the longest."""

AUTHORS = "500:lr=0.8,P=2;1000:lr=0.5,P=4;2000:lr=0.3,P=8"
"""The schedule of the authors of DeComFL."""

CODECS = ("none", "float16", "bfloat16", "int8", "int4", "qsgd", "top_k", "sign")
BROADCAST_CODECS = ("none", "float16", "bfloat16", "int8", "int4")
AGGREGATORS = (
    "mean",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "geometric_median",
    "clipped_mean",
    "majority_sign",
)
ATTACK_SIZES = {
    "gaussian": 10.0,
    "sign_flip": 1.0,
    "scaling": 10.0,
    "inner_product": 2.0,
    "trim": 2.0,
    "out_of_range": 1e30,
}
"""Attacks that have a size, and what it is unless given."""

UNSIGNED = ("scaling", "out_of_range", "nan", "inf")
"""Attacks that leave signs as they are."""

COMPARING = ("alie", "inner_product", "trim", "krum")
"""Attacks that compare uploads number by number."""

ATTACKS = ("none", *ATTACK_SIZES, "alie", "krum", "label_flip", "nan", "inf")
