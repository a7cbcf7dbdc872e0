"""Scaling fits: loss or score as a function of parameters, tokens, FLOPs or seconds.

    points = final_points(study, "ce_loss")                   # points: a table with a row per trial
    law = fit(forms.additive(), points)                       # fits: raises FitError where the points cannot tell
    law.estimate("alpha"), law.predict(wanted)                # value with its interval; a forecast
    choose([forms.additive(), forms.multiplicative()], points, largest(points, "parameters"))    # heldout

`forms` has the formulas, `projection` minimizes, `identifiability` says what points cannot tell. With a column
`method`, `fit(..., multiplied="tokens", reference="sft")` compares methods (`speedup`): they share all parameters but
one multiplier each. `study` does all this for a study. The package imports none of them.
"""
