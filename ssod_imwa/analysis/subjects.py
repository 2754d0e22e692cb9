"""What analyses of classifiers ask and show, in words; nothing is loaded for it."""

# Name of its function in `commands`, `weight_commands` or `unlabeled_totals` -> question, what is
# seen in its picture.
SUBJECTS = {
    "calibration": (
        "is a confidence of p right with probability p?",
        "Bars are accuracy by confidence. On the dashed line confidence is right; a hatched gap "
        "above a bar is overconfidence. ECE is the mean gap.",
    ),
    "confusion": (
        "which classes are taken for which?",
        "Rows are true classes, columns predictions, the most frequent class first. Bright cells "
        "left of the diagonal in lower rows: rare classes are taken for frequent ones.",
    ),
    "classes": (
        "how does recall go with the number of training images?",
        "Recall of each class below its number of training images; many, medium and few are "
        "shaded. With CLS.TRACK_PERIOD in the run also curves of each class over the training.",
    ),
    "features": (
        "do features of rare classes differ between training and test? (MFW)",
        "Training accuracy, gradient norm, classification ratio and feature deviation against "
        "training images. Rare classes that are remembered but not learned have a high deviation "
        "between training and test features.",
    ),
    "landscape": (
        "how flat is the minimum? (ECL)",
        "Test loss and accuracy when noise of growing size is added to the weights. The wider the "
        "valley, the flatter the minimum.",
    ),
    "interpolate": (
        "what lies between two runs? (BTM)",
        "Test metrics of (1 - lambda) A + lambda B. A curve without a dip: the two networks can be "
        "averaged; one above both ends: averaging helps.",
    ),
    "members": (
        "what does averaging members gain over the training? (IMWA)",
        "For each snapshot the metric of the members and of their average, the gain over the "
        "best member, and the distance of the members. Needs CLS.SNAPSHOT_PERIOD in the run.",
    ),
    "experts": (
        "how different are the experts? (ECL)",
        "Mean distance of two experts' features for each class; small is agreement. The table has "
        "the accuracy of each expert alone.",
    ),
    "embedding": (
        "which classes do the features tell apart?",
        "Test images as points, those with like features close together (t-SNE). Clusters of "
        "mixed colors are classes the features do not tell apart; distances between clusters "
        "mean nothing.",
    ),
    "tau": (
        "what do corrections after training gain?",
        "Accuracy over the strength tau of two corrections: subtracting tau log priors from the "
        "logits, and dividing a class's weights by their norm to the power tau. Few rises and "
        "many falls with tau; the dotted line is the best of all classes.",
    ),
    "totals": (
        "how many unlabeled images has each class? (DARP)",
        "Estimated unlabeled images of each class against its labeled ones, and the true ones "
        "where they are known; CLS.LABELER.TOTALS of a run with DARP. Needs CLS.SNAPSHOT_PERIOD "
        "and CLS.IMBALANCE.HOLD_OUT in the run, which should have labeled images alone.",
    ),
}
