"""Time to the first token, where scores come from, alarms."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("exchanges") as exchanges:
        exchanges.add_column(sa.Column("first_token_s", sa.Float))
    with op.batch_alter_table("scores") as scores:
        scores.alter_column("value", existing_type=sa.Float, nullable=True)
        scores.add_column(sa.Column("raw", sa.Float))
        scores.add_column(sa.Column("digest", sa.String(64)))
    op.create_table(
        "alarms",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("rule", sa.Text, nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("low", sa.Float),
        sa.Column("high", sa.Float),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("began", sa.Float, nullable=False, index=True),
        sa.Column("ended", sa.Float),
    )
