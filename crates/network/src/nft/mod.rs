//! nf_tables' messages (`linux/netfilter/nf_tables.h`), as far as our table needs
//! them. A [`Transaction`] is carried out as a whole or not at all.
//!
//! ```text
//! mod.rs    tables, chains, rules, sets and their elements, in a transaction
//! expr.rs   what a rule is made of
//! ```

mod expr;

pub(crate) use expr::{Expressions, Family, Nat, R0, R1, R2, R4, R5, R6};

use crate::netlink::{Batch, Refused, Socket, Writer, attribute, flags, messages, text_of};
use ::types::Result;

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NFTABLES: u8 = 10;
/// `NFPROTO_INET`: both families in one table.
const INET: u8 = 1;

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DEL_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const DEL_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const DEL_SET: u16 = 11;
const NEW_ELEMENTS: u16 = 12;
const DEL_ELEMENTS: u16 = 14;

const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
/// So many elements go into one message: an attribute holds 64 KiB.
const ELEMENTS: usize = 256;
/// `NFT_SET_MAP`
const MAP: u32 = 8;

/// A base chain's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    Prerouting,
    Output,
    Postrouting,
}

impl Hook {
    fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Output => 3,
            Self::Postrouting => 4,
        }
    }
}

/// Type, hook and priority of a base chain. Its policy is to accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) kind: &'static str,
    pub(crate) hook: Hook,
    pub(crate) priority: i32,
}

/// What a key or a value is made of; `nft` shows it by these types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Ipv4,
    Ipv6,
    Protocol,
    Port,
}

impl Field {
    /// `nft`'s number for it: the kernel only keeps it.
    fn kind(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }

    fn length(self) -> u32 {
        if self == Self::Ipv6 { 16 } else { 4 }
    }

    fn kinds(fields: &[Self]) -> u32 {
        fields.iter().fold(0, |all, f| all << 6 | f.kind())
    }

    fn lengths(fields: &[Self]) -> u32 {
        fields.iter().map(|f| f.length()).sum()
    }
}

/// An element of a set, or of a map where it has a value: each field padded to 4
/// bytes, as registers hold it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Vec<u8>>,
}

/// Changes of one table that happen together.
#[derive(Debug)]
pub(crate) struct Transaction<'a> {
    table: &'a str,
    batch: Batch,
    sets: u32,
}

impl<'a> Transaction<'a> {
    pub(crate) fn new(table: &'a str) -> Self {
        let mut batch = Batch::default();
        batch.push("begin a transaction of nftables", BATCH_BEGIN, 0, |w| w.raw(&[0, 0, 0, NFTABLES]));
        Self { table, batch, sets: 0 }
    }

    fn push(&mut self, what: String, kind: u16, flags: u16, fill: impl FnOnce(&mut Writer)) {
        let table = self.table;
        self.batch.push(what, u16::from(NFTABLES) << 8 | kind, flags, |w| {
            w.raw(&[INET, 0, 0, 0]);
            // The table's name is attribute 1 of every message.
            w.text(1, table);
            fill(w);
        });
    }

    /// The table; one that is there is kept.
    pub(crate) fn add_table(&mut self) {
        let what = format!("make the nftables table inet {}", self.table);
        self.push(what, NEW_TABLE, flags::CREATE, |_| {});
    }

    /// Removes the table with all that is in it.
    pub(crate) fn del_table(&mut self) {
        let what = format!("remove the nftables table inet {}", self.table);
        self.push(what, DEL_TABLE, 0, |_| {});
    }

    pub(crate) fn add_chain(&mut self, name: &str, base: Option<Base>) {
        let what = format!("make the nftables chain {name} in {}", self.table);
        self.push(what, NEW_CHAIN, flags::CREATE, |w| {
            w.text(3, name);
            if let Some(base) = base {
                w.nest(4, |w| {
                    w.be32(1, base.hook.number());
                    w.attr(2, &base.priority.to_be_bytes());
                });
                w.be32(5, 1);
                w.text(7, base.kind);
            }
        });
    }

    /// Empties a chain.
    pub(crate) fn flush_chain(&mut self, name: &str) {
        let what = format!("empty the nftables chain {name} in {}", self.table);
        self.push(what, DEL_RULE, 0, |w| w.text(2, name));
    }

    /// Adds a rule at a chain's end.
    pub(crate) fn add_rule(&mut self, chain: &str, rule: Expressions) {
        let what = format!("add a rule to the nftables chain {chain} in {}", self.table);
        self.push(what, NEW_RULE, flags::CREATE | flags::APPEND, |w| {
            w.text(2, chain);
            w.nest(4, |w| w.raw(&rule.into_bytes()));
        });
    }

    /// A set of keys, or a map from keys to values.
    pub(crate) fn add_set(&mut self, name: &str, key: &[Field], value: Option<&[Field]>) {
        let what = format!("make the nftables set {name} in {}", self.table);
        self.sets += 1;
        let id = self.sets;
        self.push(what, NEW_SET, flags::CREATE, |w| {
            w.text(2, name);
            w.be32(3, if value.is_some() { MAP } else { 0 });
            w.be32(4, Field::kinds(key));
            w.be32(5, Field::lengths(key));
            if let Some(value) = value {
                w.be32(6, Field::kinds(value));
                w.be32(7, Field::lengths(value));
            }
            w.be32(10, id);
        });
    }

    /// Adds elements; those that are there already are no error unless their value
    /// differs.
    pub(crate) fn add_elements(&mut self, set: &str, elements: &[Element]) {
        let what = format!("add to the nftables set {set} in {}", self.table);
        self.elements(&what, NEW_ELEMENTS, flags::CREATE, set, elements);
    }

    /// Takes elements out; one that is missing fails the transaction.
    pub(crate) fn del_elements(&mut self, set: &str, elements: &[Element]) {
        let what = format!("take from the nftables set {set} in {}", self.table);
        self.elements(&what, DEL_ELEMENTS, 0, set, elements);
    }

    fn elements(&mut self, what: &str, kind: u16, flags: u16, set: &str, elements: &[Element]) {
        for some in elements.chunks(ELEMENTS) {
            self.push(what.to_owned(), kind, flags, |w| {
                w.text(2, set);
                w.nest(3, |w| some.iter().for_each(|e| w.nest(LIST_ELEM, |w| element(w, e))));
            });
        }
    }

    /// Carries it out; the first message that was refused tells why it was not.
    pub(crate) fn commit(mut self, socket: &Socket) -> Result<Result<(), Refused>> {
        self.batch.push("commit a transaction of nftables", BATCH_END, 0, |w| w.raw(&[0, 0, 0, NFTABLES]));
        Ok(socket.carry_out(&self.batch)?.into_iter().next().map_or(Ok(()), Err))
    }
}

fn element(w: &mut Writer, element: &Element) {
    w.nest(1, |w| w.attr(DATA_VALUE, &element.key));
    if let Some(value) = &element.value {
        w.nest(2, |w| w.attr(DATA_VALUE, value));
    }
}

/// The ports of the sockets through which something was taken out of a table, of the
/// family inet, in what the kernel has announced.
pub(crate) fn who_took_from(table: &str, announced: &[u8]) -> Vec<u32> {
    let ends = [DEL_TABLE, DEL_CHAIN, DEL_RULE, DEL_SET, DEL_ELEMENTS].map(|kind| u16::from(NFTABLES) << 8 | kind);
    let of_table = |body: &[u8]| {
        body.first() == Some(&INET) && body.get(4..).and_then(|b| attribute(b, 1)).is_some_and(|n| text_of(n) == table)
    };
    messages(announced).filter(|m| ends.contains(&m.kind) && of_table(m.body)).map(|m| m.port).collect()
}

/// Whether a table of the family inet has this name.
pub(crate) fn table_exists(socket: &Socket, table: &str) -> Result<bool> {
    let mut question = Batch::default();
    let kind = u16::from(NFTABLES) << 8 | GET_TABLE;
    question.push(format!("look for the nftables table inet {table}"), kind, flags::ACK, |w| {
        w.raw(&[INET, 0, 0, 0]);
        w.text(1, table);
    });
    match socket.ask(&question, |_, _| {})? {
        Ok(()) => Ok(true),
        Err(e) if e.errno == rustix::io::Errno::NOENT => Ok(false),
        Err(e) => Err(e.into()),
    }
}
