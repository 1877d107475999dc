"""Hamilton-Jacobi-Bellman: the value function of section 4.3 and the feedback that it gives.

`solve_value_function` solves (4.12) on label domains of few cells, and `closed_loop` steers by it. Near one optimal trajectory
`LocalFeedback` and `LowRankFeedback` hold the value function to second order on any domain, and `LocalClosedLoop` steers by
them.
"""
