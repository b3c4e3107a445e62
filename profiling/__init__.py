"""The instruments: what a step costs, measured from outside the thing measured."""
