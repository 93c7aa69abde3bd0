"""Pref-GRPO: groups of pictures drawn by the policy, judged, and learnt from."""
