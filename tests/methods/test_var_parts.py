"""Settings that make no model are refused before anything is built."""

from dataclasses import replace

import pytest

from cil.config import TokenizerConfig, VARConfig
from cil.errors import UserError
from cil.methods.var_parts import check_settings


@pytest.mark.parametrize(
    ("tokenizer", "var", "message"),
    [
        ({"scales": [1, 2, 3]}, {}, "6 px"),
        ({"multipliers": [1, 1, 1]}, {}, "16 px"),
        ({"scales": [1, 3, 2, 4]}, {}, "tokenizer.scales"),
        ({"scales": [1, 2, 2, 4]}, {}, "tokenizer.scales"),
        ({"scales": [0, 2, 4]}, {}, "tokenizer.scales"),
        ({"vocabulary": 1}, {}, "tokenizer.vocabulary"),
        ({"vocabulary": 32769}, {}, "tokenizer.vocabulary"),
        ({"steps": 0}, {}, "tokenizer.steps"),
        ({}, {"heads": 5}, "var.heads"),
        ({}, {"views": 0}, "var.views"),
        ({}, {"lr": -1.0}, "var.lr"),
        ({}, {"lr": float("inf")}, "var.lr"),
        ({"scales": [4]}, {}, "at least two"),
        ({}, {"condition_from": 4}, r"var\.depth is 3"),
        ({}, {"condition_from": 1, "plasticity": "scratch"}, r"var\.condition_from is 1"),
        ({}, {"smoothing_samples": 0}, "var.smoothing_samples"),
        ({}, {"smoothing_sigma": -0.1}, "var.smoothing_sigma"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny_stream, tiny_tokenizer_config, tokenizer, var, message
):
    with pytest.raises(UserError, match=message):
        check_settings(
            tiny_stream, replace(tiny_tokenizer_config, **tokenizer), replace(VARConfig(), **var)
        )


def test_the_shipped_settings_fit(tiny_stream):
    check_settings(replace(tiny_stream, image_size=16), TokenizerConfig(), VARConfig())
