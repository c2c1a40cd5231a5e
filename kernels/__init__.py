"""Operations that set the pace of training: each with a plain reference and faster implementations of the same signature."""
