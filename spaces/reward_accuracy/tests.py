"""Cases for the metric: inputs, settings, and some of the numbers that must come out."""

test_cases = [
    {
        "predictions": [2.0, 1.0, 0.0, 3.0],
        "references": [1.0, 1.0, 1.0, 0.0],
        "result": {"n": 4.0, "accuracy": 0.625, "tie_rate": 0.25, "mean_margin": 0.75, "median_margin": 0.5},
    },
    {
        "predictions": [2.0, 1.0, 0.0, 3.0],
        "references": [1.0, 1.0, 1.0, 0.0],
        "arguments": {"ties": 0, "subsets": ["a", "a", "b", "b"], "sections": {"all": ["a", "b"]}},
        "result": {"accuracy": 0.5, "accuracy/a": 0.5, "accuracy/b": 0.5, "section/all": 0.5},
    },
    {
        "predictions": [0.0],
        "references": [0.0],
        "result": {"brier": 0.25, "ece": 0.0, "temperature": 1.0, "temperature_at_bound": 1.0},
    },
    {
        "config_name": "one_to_many",
        "predictions": [1.0, 5.0],
        "references": [[1.0] * 9, [1.0] * 9],
        "result": {"accuracy": 0.5, "mrr": 0.55, "tie_rate": 0.5, "mean_margin": 2.0},
    },
    {
        "config_name": "graded",
        "predictions": [[1.0, 2.0, 3.0, 4.0]],
        "references": [[4.0, 3.0, 2.0, 1.0]],
        "result": {"best_of_1": 2.5, "best_of_4": 1.0, "kendall": -1.0, "spearman": -1.0},
    },
]
