"""The ways to repair a pruned model, by the names that ``mode`` knows. Nothing heavy is imported here."""

REPEATS = 0.125  # of the rows of a repair, see keyreduce.recovery.repeats
LEAST_SQUARES = "least-squares"
RECONSTRUCT = "reconstruct"
MODES = {
    LEAST_SQUARES: "refit each layer's output projection in closed form to what the dense mixer gives",
    RECONSTRUCT: "then fit each layer on its own, by gradient steps, to what the dense layer gives",
}
