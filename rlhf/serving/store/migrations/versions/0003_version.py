"""The version of the registry that responded."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"
branch_labels = depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("exchanges") as exchanges:
        exchanges.add_column(sa.Column("version", sa.Text))
