"""SECURA's stages M1 and M2, which begin the next task: for the layers here and those of PEFT."""


class Stages:
    """The part of a layer that takes stages with its adapters. W stays as it is: what was learned
    is kept beside it as one more core between the same C and R."""

    def stage_m1(self) -> None:
        """M1 [SECURA, W <- W + delta_W]: what has been learned becomes the next stage's base, the
        core is zero, and training goes on. C and R stay those of the first W.

        Without a gate the output does not change. With one on outputs delta_W joins the base
        without it, as published, and the output does change. The adapter bias stays.

        Raises:
            RuntimeError: a merged layer, one that has taken an M2 stage, or a gate in the weight
                domain, whose W_eff is no delta_W.
        """
        self._stage("m1")

    def stage_m2(self) -> None:
        """M2 [SECURA]: B_long <- B_long + B, A_long <- A, B = 0 (U_long <- U_long + U, U = 0).

        Raises:
            RuntimeError: a merged layer, or one that has taken an M1 stage.
        """
        self._stage("m2")

    def _stage(self, kind: str) -> None:
        if self.merged:
            raise RuntimeError(f"stage_{kind} needs an unmerged layer: call unmerge() first")
        for adapter in self.active_adapter_modules():
            adapter.stage(kind)
