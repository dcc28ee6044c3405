"""Remote homology: the fold of a SCOP domain, tested on folds' families and superfamilies never seen (TAPE)."""

from megaprot.finetune.kinds import Classification


class RemoteHomology(Classification):
    """One of TAPE's 1,195 folds."""

    name = folder = "remote_homology"
    key = "fold_label"
    num_classes = 1195


TASK = RemoteHomology
