//! How the database is laid out, and how an older one becomes what it is now.
//!
//! | layout | log | beside it | |
//! |---|---|---|---|
//! | 1 | `log` | `meta` | values as they are |
//! | 2 | `entries` | `values` | values are sealed; `meta` holds the layout, so that a program that knows only the first refuses it |

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use super::{
    disk::{DiskError, END},
    encode,
    seal::Place,
    trouble::Flaw,
};

pub(super) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("entries");
pub(super) const VALUES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("values");

const LAYOUT: TableDefinition<'_, &str, u32> = TableDefinition::new("meta");
const FIRST_LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const FIRST_META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// The layout that this program writes.
const NOW: u32 = 2;
const KEY: &str = "layout";

/// Makes the tables of an empty database, or brings those of an older one up to date.
pub(super) fn prepare(database: &Database) -> Result<(), DiskError> {
    match read(database)? {
        Some(NOW) => Ok(()),
        Some(1) => upgrade(database),
        Some(newer) if newer > NOW => Err(DiskError::Newer { found: newer }),
        Some(other) => Err(Flaw::new("the layout", NOW, other).into()),
        None => make(database),
    }
}

/// The layout of what is there; `None` where nothing is.
fn read(database: &Database) -> Result<Option<u32>, DiskError> {
    let transaction = database.begin_read()?;
    match transaction.open_table(LAYOUT) {
        Ok(table) => match table.get(KEY)? {
            Some(layout) => Ok(Some(layout.value())),
            None => Err(Flaw::new("the layout", NOW, "none").into()),
        },
        Err(TableError::TableTypeMismatch { .. }) => Ok(Some(1)),
        Err(TableError::TableDoesNotExist(_)) => {
            let mut tables = transaction.list_tables()?;
            match tables.next() {
                None => Ok(None),
                Some(_) => Err(Flaw::new("the layout", NOW, "none").into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

fn make(database: &Database) -> Result<(), DiskError> {
    let mut transaction = database.begin_write()?;
    transaction.set_two_phase_commit(true);
    transaction.open_table(LOG)?;
    transaction.open_table(VALUES)?;
    transaction.open_table(LAYOUT)?.insert(KEY, NOW)?;
    Ok(transaction.commit()?)
}

fn upgrade(database: &Database) -> Result<(), DiskError> {
    tracing::info!(
        to = NOW,
        "the data get a new layout, which an older program cannot read"
    );
    let mut transaction = database.begin_write()?;
    transaction.set_two_phase_commit(true);
    {
        let mut log = transaction.open_table(LOG)?;
        let mut end = 0_u64;
        for row in transaction.open_table(FIRST_LOG)?.iter()? {
            let (index, entry) = row?;
            let index = index.value();
            let entry = Place::Entry(index).seal(entry.value().to_vec());
            log.insert(index, entry.as_slice())?;
            end = index.saturating_add(1);
        }
        let mut values = transaction.open_table(VALUES)?;
        for row in transaction.open_table(FIRST_META)?.iter()? {
            let (key, value) = row?;
            let value = Place::Value(key.value()).seal(value.value().to_vec());
            values.insert(key.value(), value.as_slice())?;
        }
        let end = Place::Value(END).seal(encode(&end)?);
        values.insert(END, end.as_slice())?;
    }
    transaction.delete_table(FIRST_LOG)?;
    transaction.delete_table(FIRST_META)?;
    transaction.open_table(LAYOUT)?.insert(KEY, NOW)?;
    Ok(transaction.commit()?)
}
