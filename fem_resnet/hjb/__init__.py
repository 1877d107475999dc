"""Hamilton-Jacobi-Bellman: the value function of section 4.3 and the feedback that it gives.

`solve_value_function` solves (4.11), (4.12) on label domains of few cells, with a head or another terminal cost too, and
`closed_loop` follows the feedback. On any label domain, `LocalFeedback` and `LowRankFeedback` give the value function to
second order near one optimal trajectory, and `LocalClosedLoop` follows their feedback.
"""
