//! What an operator should know of the daemon, for `longshore doctor` and Status.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// So many removed leftovers are remembered by name, the newest.
const REMEMBERED: usize = 50;

/// What a trouble is about; `doctor` groups by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// The metadata database.
    Database,
    /// A record or bundle that was put aside.
    Quarantine,
    /// What no pod, container or image has.
    Leftovers,
}

impl Check {
    /// One word for people and programs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::Quarantine => "quarantine",
            Self::Leftovers => "leftovers",
        }
    }
}

/// Something that is not as it should be, and what to do about it.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// What it is about.
    pub check: Check,
    /// What was found, with its object.
    pub found: String,
    /// What an operator can do.
    pub remedy: String,
}

/// What the reconciliation has done since the daemon's start.
#[derive(Debug, Clone, Default)]
pub struct Rounds {
    /// How many there were.
    pub count: u64,
    /// When the last one ended.
    pub last: Option<SystemTime>,
    /// How many leftovers all of them removed.
    pub removed: u64,
    /// What they were, the newest last.
    pub recent: Vec<String>,
    /// What the last one could not remove, or found and left alone.
    pub left: Vec<Trouble>,
}

#[derive(Debug, Default)]
struct State {
    database: Option<Trouble>,
    count: u64,
    last: Option<SystemTime>,
    removed: u64,
    recent: VecDeque<String>,
    left: Vec<Trouble>,
}

/// The daemon's state of health. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what became of a damaged database.
    pub(crate) fn database_was(&self, restored: &store::Restored) {
        let aside = match &restored.aside {
            Some(path) => format!("; it lies aside as {}", path.display()),
            None => String::new(),
        };
        let (found, remedy) = if restored.complete {
            ("its records were restored from their copy", "look at the disk; remove the file once it is of no use")
        } else {
            (
                "nothing of it could be restored: pods that run are in quarantine, images are gone",
                "look at the disk; stop and remove the pods in quarantine; pull the images again",
            )
        };
        let found = format!("was damaged ({}) and {found}{aside}", restored.why);
        self.state().database = Some(Trouble { check: Check::Database, found, remedy: remedy.into() });
    }

    /// Notes a round of the reconciliation, and gives what the one before did not find.
    pub(crate) fn note_round(&self, removed: &[String], left: Vec<Trouble>) -> Vec<Trouble> {
        let mut state = self.state();
        state.count += 1;
        state.last = Some(SystemTime::now());
        state.removed += removed.len() as u64;
        state.recent.extend(removed.iter().cloned());
        let over = state.recent.len().saturating_sub(REMEMBERED);
        state.recent.drain(..over);
        let before = std::mem::replace(&mut state.left, left);
        state.left.iter().filter(|t| !before.iter().any(|b| b.found == t.found)).cloned().collect()
    }

    /// What became of the database, where it was damaged at the daemon's start.
    pub fn database(&self) -> Option<Trouble> {
        self.state().database.clone()
    }

    /// What the reconciliation has done.
    pub fn rounds(&self) -> Rounds {
        let state = self.state();
        Rounds {
            count: state.count,
            last: state.last,
            removed: state.removed,
            recent: state.recent.iter().cloned().collect(),
            left: state.left.clone(),
        }
    }

    /// For Status, with what is in quarantine.
    pub(crate) fn json(&self, quarantine: &[Trouble]) -> Value {
        let rounds = self.rounds();
        let seconds = |at: SystemTime| at.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let all = self.database().into_iter().chain(quarantine.iter().cloned()).chain(rounds.left);
        let troubles: Vec<Value> =
            all.map(|t| json!({ "check": t.check.word(), "found": t.found, "remedy": t.remedy })).collect();
        json!({
            "troubles": troubles,
            "reconciliations": rounds.count,
            "lastReconciliation": rounds.last.map(seconds),
            "leftoversRemoved": rounds.removed,
        })
    }
}
