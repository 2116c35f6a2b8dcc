"""Reports about finished runs: report.html, the comparison of evaluations, and the view of a PPO rollout."""
