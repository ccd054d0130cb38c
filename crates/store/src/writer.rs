//! The one thread that writes.
//!
//! ```text
//! Store::write ──mpsc──▶ thread: [PRAGMA synchronous] BEGIN IMMEDIATE, f, COMMIT
//!      ▲                            │ disk full: give up the ballast, once more
//!      │                            │ changed anything: the same in the copy
//!      └────────oneshot─────────────┘
//! ```

use crate::ballast::Ballast;
use crate::copy::Copy;
use crate::{Durability, SqlExt};
use rusqlite::{Connection, Transaction, TransactionBehavior};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::oneshot;
use types::{Error, ErrorKind, Result, ResultExt};

pub(crate) struct Writer {
    queue: Sender<Message>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a transaction is for: only an end may have the ballast, or new things would
/// use up what their ends will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Something new.
    New,
    /// A change or an end of what is there.
    End,
}

enum Message {
    Run(Durability, Purpose, Box<dyn Job>),
    Stop,
}

/// A transaction whose result type is hidden from the thread.
pub(crate) trait Job: Send {
    /// Runs it for its answer.
    fn run(&mut self, transaction: &Transaction<'_>) -> Result<()>;
    /// Runs it once more for its changes alone.
    fn repeat(&mut self, transaction: &Transaction<'_>) -> Result<()>;
    fn finish(self: Box<Self>, outcome: Result<()>);
}

struct Request<F, T> {
    f: F,
    value: Option<T>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T, F> Job for Request<F, T>
where
    T: Send,
    F: FnMut(&Transaction<'_>) -> Result<T> + Send,
{
    fn run(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        self.value = Some((self.f)(transaction)?);
        Ok(())
    }

    fn repeat(&mut self, transaction: &Transaction<'_>) -> Result<()> {
        (self.f)(transaction).map(drop)
    }

    fn finish(self: Box<Self>, outcome: Result<()>) {
        let result = match (outcome, self.value) {
            (Ok(()), Some(value)) => Ok(value),
            (Ok(()), None) => Err(Error::internal("database transaction gave no result")),
            (Err(e), _) => Err(e),
        };
        // The caller may be gone; the transaction stands all the same.
        let _ = self.reply.send(result);
    }
}

impl Writer {
    /// Starts it on a database that has seen `sequence` changes.
    pub(crate) fn start(connection: Connection, dir: &Path, copies: Option<&Path>, sequence: i64) -> Result<Self> {
        let (queue, requests) = channel();
        let (ballast, copy) = (Ballast::new(dir), copies.map(Copy::new));
        let mut state = State { connection, ballast, copy, durability: Durability::Normal, sequence };
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || state.serve(&requests))
            .context(|| "start the database's writer thread".into())?;
        Ok(Self { queue, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn send<T, F>(
        &self,
        durability: Durability,
        purpose: Purpose,
        f: F,
    ) -> Result<oneshot::Receiver<Result<T>>>
    where
        T: Send + 'static,
        F: FnMut(&Transaction<'_>) -> Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Request { f, value: None, reply });
        self.queue.send(Message::Run(durability, purpose, job)).map_err(|_| closed())?;
        Ok(answer)
    }

    /// Waits until all that was sent before has been carried out.
    pub(crate) fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = self.queue.send(Message::Stop);
            if thread.join().is_err() {
                tracing::error!("the database's writer thread had panicked");
            }
        }
    }
}

pub(crate) fn closed() -> Error {
    Error::unavailable("the database is closed")
}

struct State {
    connection: Connection,
    ballast: Ballast,
    copy: Option<Copy>,
    durability: Durability,
    /// Of transactions that changed anything.
    sequence: i64,
}

impl State {
    fn serve(&mut self, requests: &Receiver<Message>) {
        if let Some(copy) = &mut self.copy {
            copy.make(&self.connection);
        }
        while let Ok(Message::Run(durability, purpose, mut job)) = requests.recv() {
            let mut outcome = self.attempt(durability, job.as_mut());
            if let Err(error) = &outcome
                && purpose == Purpose::End
                && self.blames_the_disk(error)
                && self.ballast.give_up()
            {
                outcome = self.attempt(durability, job.as_mut());
            }
            // Before the answer: who has it may count on the record.
            if let Ok(changes @ 1..) = outcome
                && let Some(copy) = &mut self.copy
            {
                copy.follow(&self.connection, job.as_mut(), self.sequence, changes);
            }
            let committed = outcome.is_ok();
            job.finish(outcome.map(drop).map_err(|e| self.named(e)));
            if committed {
                self.ballast.restore();
            }
        }
    }

    /// Commits it, and gives the number of rows that it changed.
    fn attempt(&mut self, durability: Durability, job: &mut dyn Job) -> Result<u64> {
        if durability != self.durability {
            let level = match durability {
                Durability::Normal => "NORMAL",
                Durability::Full => "FULL",
            };
            self.connection
                .pragma_update(None, "synchronous", level)
                .sql(|| format!("set the database's synchronous mode to {level}"))?;
            self.durability = durability;
        }
        let before = self.connection.total_changes();
        let transaction = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .sql(|| "begin a database transaction".into())?;
        job.run(&transaction)?;
        let changes = transaction.total_changes() - before;
        if changes > 0 {
            crate::mark::set_sequence(&transaction, self.sequence + 1)?;
        }
        fault::during(fault::Step::StoreCommit, || transaction.commit().sql(|| "commit to the database".into()))?;
        if changes > 0 {
            self.sequence += 1;
        }
        Ok(changes)
    }

    /// Names the file where its disk is to blame.
    fn named(&self, error: Error) -> Error {
        if self.blames_the_disk(&error) {
            let database = self.ballast.beside().join(crate::FILE_NAME);
            error.with_kind(ErrorKind::ResourceExhausted).within(format!("the disk of {} is full", database.display()))
        } else {
            error
        }
    }

    /// SQLite reports a full disk as `SQLITE_FULL` or, from the shared-memory
    /// file, as a plain IO error. A range of addresses can be exhausted, too.
    fn blames_the_disk(&self, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::ResourceExhausted => error.is_because_of::<rusqlite::Error>(),
            ErrorKind::Internal => self.ballast.disk_is_tight(),
            _ => false,
        }
    }
}
