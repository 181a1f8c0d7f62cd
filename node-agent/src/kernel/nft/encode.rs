//! Encodes one family's part of a transaction: structure, elements, stamp, in an order that the kernel accepts.
//!
//! Chains precede the rules that refer to them, maps precede chains, deletions of elements precede additions (the kernel
//! refuses to add a present key with other data). Base chains come last: a packet passes none or all of the rules.

use std::collections::{BTreeMap, BTreeSet};

use super::batch::Batch;
use super::data::write_value;
use super::dump::{DumpedHook, TableDump};
use super::element::{Changes, Data, Element};
use super::layout::{Chain, Hooks, Layout, RuleConfig, SetSpec, TABLE, source_list_name, source_list_of};
use super::mirror::Mirror;
use super::nfta;
use crate::kernel::netlink::wire::Writer;

/// Maximum bytes of elements per message: a nest holds less than 64 KiB.
const CHUNK: usize = 60_000;
/// The policy of all our base chains.
const POLICY: u32 = libc::NF_ACCEPT as u32;

/// A pending change: the element, its value in the kernel, and the desired value.
type Change<'a, const N: usize> = (&'a Element<N>, &'a (Option<Data<N>>, Option<Data<N>>));

/// The known structure of one table in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Structure {
    /// The table exists as we built it; otherwise the next transaction creates it.
    pub(crate) built: bool,
    /// No table exists, so that it may be built in parts: no packet loses a rule in between.
    pub(crate) absent: bool,
    /// The configuration that the chains in the kernel were written with.
    pub(crate) config: RuleConfig,
    /// Chains with foreign rules, which the next transaction rewrites.
    pub(crate) broken: BTreeSet<String>,
    /// Foreign chains, which the next transaction removes.
    pub(crate) foreign_chains: Vec<String>,
    /// Foreign sets, which the next transaction removes.
    pub(crate) foreign_sets: Vec<String>,
    /// The stamp's entries in the kernel.
    pub(crate) stamp: BTreeMap<u32, [u8; 16]>,
}

/// The operation of a message of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Add,
    Delete,
}

impl Operation {
    /// Returns the message type and its flags.
    fn message(self) -> (i32, i32) {
        match self {
            Operation::Add => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE),
            Operation::Delete => (libc::NFT_MSG_DELSETELEM, 0),
        }
    }
}

/// The elements of one message, to map errors back to them.
#[derive(Debug)]
struct Group<const N: usize> {
    message: usize,
    /// The element of each list entry; an interval takes two.
    elements: Vec<Element<N>>,
    operation: Operation,
}

/// Maps refused messages back to elements.
#[derive(Debug, Default)]
pub(crate) struct Encoded<const N: usize> {
    groups: Vec<Group<N>>,
    /// Number of operations without the stamp.
    pub(crate) operations: u32,
}

impl<const N: usize> Encoded<N> {
    /// Returns the element at a list position of a message and its operation. Without a position, only if the message
    /// holds one element.
    pub(crate) fn element(&self, message: usize, position: Option<usize>) -> Option<(Element<N>, Operation)> {
        let group = self.group(message)?;
        let position = position
            .or_else(|| group.elements.iter().all(|other| *other == group.elements[0]).then_some(0))?;
        Some((*group.elements.get(position)?, group.operation))
    }

    /// Returns whether a message holds elements.
    pub(crate) fn has(&self, message: usize) -> bool {
        self.group(message).is_some()
    }

    /// Groups are in the order of their messages.
    fn group(&self, message: usize) -> Option<&Group<N>> {
        let index = self.groups.binary_search_by_key(&message, |group| group.message).ok()?;
        self.groups.get(index)
    }
}

/// Writes the changes of one family, with at most `chunk` elements per message.
pub(crate) fn family<const N: usize>(
    batch: &mut Batch,
    mirror: &Mirror<N>,
    structure: &Structure,
    stamp: &BTreeMap<u32, [u8; 16]>,
    chunk: usize,
) -> Encoded<N> {
    let layout = Layout::new(N);
    let start = batch.len();
    let mut encoded = Encoded { groups: Vec::new(), operations: 0 };
    let config = &mirror.facts.rules;
    let chains = if structure.built { Vec::new() } else { layout.chains(config) };
    if !structure.built {
        build(batch, layout, &chains);
    }
    let mut elements = 0;
    let mut changes: Vec<_> = mirror.changes.0.iter().collect();
    changes.sort_unstable_by_key(|(element, _)| **element);
    new_structure(batch, layout, &changes);
    if structure.built {
        remove_foreign_rules(batch, layout, structure);
        remove_hooks(batch, layout, structure, config);
        rewrite_chains(batch, layout, structure, mirror);
    }
    let deletes = changes.iter().filter(|(_, (before, _))| before.is_some());
    let deletes: Vec<(Element<N>, Option<Data<N>>)> = deletes.map(|(element, _)| (**element, None)).collect();
    elements +=
        ElementWriter { batch, layout, encoded: &mut encoded, chunk }.write(&deletes, Operation::Delete);
    let adds = changes.iter().filter(|(_, (_, after))| after.is_some());
    let adds: Vec<(Element<N>, Option<Data<N>>)> =
        adds.map(|(element, (_, after))| (**element, *after)).collect();
    elements += ElementWriter { batch, layout, encoded: &mut encoded, chunk }.write(&adds, Operation::Add);
    let added = if structure.built { added_hooks(layout, structure, mirror) } else { chains };
    for chain in added.iter().filter(|chain| chain.hook.is_some()) {
        new_chain(batch, layout, chain);
        write_rules(batch, layout, chain, false);
    }
    old_structure(batch, layout, &changes, structure);
    let messages = batch.len() - start - encoded.groups.len();
    encoded.operations = (messages + elements) as u32;
    write_stamp(batch, layout, structure, stamp);
    encoded
}

/// Returns the base chains that the transaction adds. With a change in several parts the last one adds them: packets
/// must not pass an incomplete table.
fn added_hooks<const N: usize>(layout: Layout, structure: &Structure, mirror: &Mirror<N>) -> Vec<Chain> {
    let wanted = written_hooks(structure, mirror);
    let added = structure.config.hooks == Hooks::Absent && wanted == Hooks::Registered;
    if added { layout.base_chains(&mirror.facts.rules) } else { Vec::new() }
}

/// Returns whether the table has base chains after the next transaction.
pub(crate) fn written_hooks<const N: usize>(structure: &Structure, mirror: &Mirror<N>) -> Hooks {
    let early = structure.built && !mirror.is_last_part() && structure.config.hooks == Hooks::Absent;
    if early { Hooks::Absent } else { mirror.facts.rules.hooks }
}

/// Removes the base chains, if the table shall have none.
fn remove_hooks(batch: &mut Batch, layout: Layout, structure: &Structure, config: &RuleConfig) {
    if structure.config.hooks == Hooks::Registered && config.hooks == Hooks::Absent {
        for chain in layout.base_chains(config) {
            flush_chain(batch, layout, &chain.name);
            delete_chain(batch, layout, &chain.name);
        }
    }
}

/// Writes the removal of one element.
pub(crate) fn removal<const N: usize>(batch: &mut Batch, element: Element<N>) {
    let mut encoded = Encoded { groups: Vec::new(), operations: 0 };
    let writer = ElementWriter { batch, layout: Layout::new(N), encoded: &mut encoded, chunk: usize::MAX };
    writer.write(&[(element, None)], Operation::Delete);
}

/// Creates the table, its constant sets and chains; base chains come at the end.
fn build(batch: &mut Batch, layout: Layout, chains: &[Chain]) {
    let table = |batch: &mut Batch, kind, flags| {
        batch.push(kind, flags, layout.family, |writer| {
            writer.string(nfta::table::NAME, TABLE);
            if kind == libc::NFT_MSG_NEWTABLE {
                writer.number(nfta::table::FLAGS, 0);
            }
        });
    };
    // Create, delete, create: works whether the table exists or not, and leaves nothing of an old one. If there was none,
    // the kernel shows an empty table until the transaction is committed.
    table(batch, libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE);
    table(batch, libc::NFT_MSG_DELTABLE, 0);
    table(batch, libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE);
    for set in layout.sets() {
        new_set(batch, layout, &set);
    }
    for chain in chains.iter().filter(|chain| chain.hook.is_none()) {
        new_chain(batch, layout, chain);
    }
    for chain in chains.iter().filter(|chain| chain.hook.is_none()) {
        write_rules(batch, layout, chain, false);
    }
}

fn new_set(batch: &mut Batch, layout: Layout, set: &SetSpec) {
    let id = batch.set_id();
    batch.push(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, layout.family, |writer| {
        set.encode(writer, TABLE, id);
    });
}

fn new_chain(batch: &mut Batch, layout: Layout, chain: &Chain) {
    use nfta::{chain as attribute, hook as hooked};
    batch.push(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE, layout.family, |writer| {
        writer.string(attribute::TABLE, TABLE);
        writer.string(attribute::NAME, &chain.name);
        if let Some(hook) = &chain.hook {
            writer.nest(attribute::HOOK, |writer| {
                writer.number(hooked::NUMBER, hook.number);
                writer.number(hooked::PRIORITY, hook.priority as u32);
            });
            writer.number(attribute::POLICY, POLICY);
            writer.string(attribute::TYPE, hook.kind);
        }
    });
}

/// Appends a chain's rules; with `replace` removes the existing ones first.
fn write_rules(batch: &mut Batch, layout: Layout, chain: &Chain, replace: bool) {
    if replace {
        flush_chain(batch, layout, &chain.name);
    }
    for rule in &chain.rules {
        rule.append(batch, layout.family, TABLE, &chain.name);
    }
}

fn flush_chain(batch: &mut Batch, layout: Layout, chain: &str) {
    batch.push(libc::NFT_MSG_DELRULE, 0, layout.family, |writer| {
        writer.string(nfta::rule::TABLE, TABLE);
        writer.string(nfta::rule::CHAIN, chain);
    });
}

fn delete_chain(batch: &mut Batch, layout: Layout, chain: &str) {
    batch.push(libc::NFT_MSG_DELCHAIN, 0, layout.family, |writer| {
        writer.string(nfta::chain::TABLE, TABLE);
        writer.string(nfta::chain::NAME, chain);
    });
}

/// Writes the sets and chains that new elements need.
fn new_structure<const N: usize>(batch: &mut Batch, layout: Layout, changes: &[Change<'_, N>]) {
    for (element, (_, after)) in changes {
        if let (Element::SourceList(list), Some(_)) = (element, after) {
            new_set(batch, layout, &layout.source_list(*list));
            let chain = layout.source_chain(*list);
            new_chain(batch, layout, &chain);
            // The chain may exist without an element that refers to it, if another process removed that.
            write_rules(batch, layout, &chain, true);
        }
    }
}

/// Removes chains and sets that no element needs any more, and foreign ones.
fn old_structure<const N: usize>(
    batch: &mut Batch,
    layout: Layout,
    changes: &[Change<'_, N>],
    structure: &Structure,
) {
    let delete_set = |batch: &mut Batch, name: &str| {
        batch.push(libc::NFT_MSG_DELSET, 0, layout.family, |writer| {
            writer.string(nfta::set::TABLE, TABLE);
            writer.string(nfta::set::NAME, name);
        });
    };
    // Before any chain: a foreign verdict map may refer to it.
    if structure.built {
        structure.foreign_sets.iter().for_each(|name| delete_set(batch, name));
    }
    for (element, (_, after)) in changes {
        if let (Element::SourceList(list), None) = (element, after) {
            let name = source_list_name(*list);
            delete_chain(batch, layout, &name);
            delete_set(batch, &name);
        }
    }
    if structure.built {
        structure.foreign_chains.iter().for_each(|name| delete_chain(batch, layout, name));
    }
}

fn remove_foreign_rules(batch: &mut Batch, layout: Layout, structure: &Structure) {
    structure.foreign_chains.iter().for_each(|chain| flush_chain(batch, layout, chain));
}

/// Rewrites the chains whose rules differ from the wanted ones.
fn rewrite_chains<const N: usize>(
    batch: &mut Batch,
    layout: Layout,
    structure: &Structure,
    mirror: &Mirror<N>,
) {
    let config = &mirror.facts.rules;
    if structure.config == *config && structure.broken.is_empty() {
        return;
    }
    let changed = changed_chains(layout, structure, config);
    let lists = mirror.source_lists().map(|list| layout.source_chain(list));
    let present = RuleConfig { hooks: structure.config.hooks, ..config.clone() };
    let removed = structure.config.hooks == Hooks::Registered && config.hooks == Hooks::Absent;
    for chain in layout.chains(&present).into_iter().chain(lists) {
        let differs = structure.broken.contains(&chain.name) || changed.contains(&chain.name);
        if differs && !(removed && chain.hook.is_some()) {
            write_rules(batch, layout, &chain, true);
        }
    }
}

/// Returns the chains whose rules differ between the configuration in the kernel and the wanted one.
fn changed_chains(layout: Layout, structure: &Structure, config: &RuleConfig) -> BTreeSet<String> {
    if structure.config == *config {
        return BTreeSet::new();
    }
    let pairs = layout.chains(&structure.config).into_iter().zip(layout.chains(config));
    pairs.filter(|(old, new)| old != new).map(|(_, new)| new.name).collect()
}

/// Writes elements into a batch, and records the messages that have them.
struct ElementWriter<'a, const N: usize> {
    batch: &'a mut Batch,
    layout: Layout,
    encoded: &'a mut Encoded<N>,
    /// Maximum number of elements per message.
    chunk: usize,
}

impl<const N: usize> ElementWriter<'_, N> {
    /// Writes elements, which are sorted by set, and returns their number. The messages of the sets alternate: while the
    /// kernel enlarges the hash table of a set in the background, adding to this set takes longer.
    fn write(mut self, elements: &[(Element<N>, Option<Data<N>>)], operation: Operation) -> usize {
        let mut sets: Vec<_> = elements.chunk_by(|(one, _), (other, _)| one.set() == other.set()).collect();
        while !sets.is_empty() {
            sets.iter_mut().for_each(|rest| *rest = self.message(rest, operation));
            sets.retain(|rest| !rest.is_empty());
        }
        elements.len()
    }

    /// Writes one message of elements of one set. Returns those that did not fit.
    fn message<'b>(
        &mut self,
        elements: &'b [(Element<N>, Option<Data<N>>)],
        operation: Operation,
    ) -> &'b [(Element<N>, Option<Data<N>>)] {
        let (kind, flags) = operation.message();
        let mut taken = 0;
        let mut entries = Vec::new();
        let message = self.batch.len();
        self.batch.push(kind, flags, self.layout.family, |writer: &mut Writer| {
            writer.string(nfta::element_list::TABLE, TABLE);
            writer.string(nfta::element_list::SET, &elements[0].0.set());
            writer.nest(nfta::element_list::ELEMENTS, |writer| {
                let start = writer.bytes.len();
                for (element, data) in elements {
                    if writer.bytes.len() - start > CHUNK || taken >= self.chunk {
                        break;
                    }
                    let count = element.encode(writer, data.as_ref());
                    entries.extend(std::iter::repeat_n(*element, count));
                    taken += 1;
                }
            });
        });
        self.encoded.groups.push(Group { message, elements: entries, operation });
        &elements[taken..]
    }
}

fn write_stamp(batch: &mut Batch, layout: Layout, structure: &Structure, stamp: &BTreeMap<u32, [u8; 16]>) {
    let mut write = |operation: Operation, entries: &[(u32, Option<[u8; 16]>)]| {
        if entries.is_empty() {
            return;
        }
        let (kind, flags) = operation.message();
        batch.push(kind, flags, layout.family, |writer| {
            writer.string(nfta::element_list::TABLE, TABLE);
            writer.string(nfta::element_list::SET, "stamp");
            writer.nest(nfta::element_list::ELEMENTS, |writer| {
                for (key, value) in entries {
                    writer.nest(nfta::list::ENTRY, |writer| {
                        write_value(writer, nfta::element::KEY, &key.to_ne_bytes());
                        if let Some(value) = value {
                            write_value(writer, nfta::element::DATA, value);
                        }
                    });
                }
            });
        });
    };
    let held = structure.stamp.iter().filter(|_| structure.built);
    let old: Vec<_> =
        held.filter(|(key, value)| stamp.get(key) != Some(value)).map(|(key, _)| (*key, None)).collect();
    let new = stamp.iter().filter(|(key, value)| !structure.built || structure.stamp.get(key) != Some(value));
    let new: Vec<_> = new.map(|(key, value)| (*key, Some(*value))).collect();
    write(Operation::Delete, &old);
    write(Operation::Add, &new);
}

/// Compares a dump with the desired content. Leaves the differing elements in the mirror's changes; returns the
/// structure in the kernel and the number of differences.
pub(crate) fn compare<const N: usize>(
    mirror: &mut Mirror<N>,
    dump: Option<TableDump<N>>,
) -> (Structure, u32) {
    let wanted = mirror.elements();
    let mut changes = Changes::default();
    let absent = dump.is_none();
    let Some(mut dump) = dump.filter(structure_fits::<N>) else {
        let count = wanted.len() as u32 + 1;
        changes.0.extend(wanted.into_iter().map(|(element, data)| (element, (None, Some(data)))));
        mirror.changes = changes;
        return (Structure { absent, ..Structure::default() }, count);
    };
    let layout = Layout::new(N);
    let config = RuleConfig { hooks: hooks_in(&dump), ..mirror.facts.rules.clone() };
    let mut structure = Structure { built: true, stamp: dump.stamp, config, ..Structure::default() };
    let mut expected: BTreeMap<String, Chain> = BTreeMap::new();
    let lists: BTreeSet<String> = mirror.source_lists().map(source_list_name).collect();
    let sources = mirror.source_lists().map(|list| layout.source_chain(list));
    for chain in layout.chains(&structure.config).into_iter().chain(sources) {
        expected.insert(chain.name.clone(), chain);
    }
    for (name, chain) in &expected {
        let rules = dump.rules.remove(name).unwrap_or_default();
        let wanted = chain.rules.iter().map(|rule| Some(rule.fingerprint(layout.family)));
        if dump.chains.contains_key(name) && !wanted.eq(rules) {
            structure.broken.insert(name.clone());
        }
    }
    // The chain and set of a source list are removed together with its element.
    let has_element = |name: &str| {
        let list = source_list_of(name);
        list.is_some_and(|list| dump.elements.contains_key(&Element::SourceList(list)))
    };
    let foreign = dump.chains.keys().filter(|name| !expected.contains_key(*name) && !has_element(name));
    structure.foreign_chains.extend(foreign.cloned());
    let known: BTreeSet<String> = layout.sets().into_iter().map(|set| set.name).chain(lists).collect();
    let foreign = dump.sets.keys().filter(|name| !known.contains(*name) && !has_element(name));
    structure.foreign_sets.extend(foreign.cloned());
    for (element, data) in &wanted {
        let before = dump.elements.remove(element);
        if before != Some(*data) {
            changes.0.insert(*element, (before, Some(*data)));
        }
    }
    changes.0.extend(dump.elements.into_iter().map(|(element, data)| (element, (Some(data), None))));
    let count = structure.broken.len() + structure.foreign_chains.len() + structure.foreign_sets.len();
    let count = count + usize::from(structure.config.hooks != mirror.facts.rules.hooks);
    let count = (count + changes.0.len()) as u32;
    mirror.changes = changes;
    (structure, count)
}

/// Returns whether a table that fits has base chains.
fn hooks_in<const N: usize>(dump: &TableDump<N>) -> Hooks {
    let base = Layout::new(N).base_chains(&RuleConfig::default());
    let registered = base.iter().any(|chain| dump.chains.contains_key(&chain.name));
    if registered { Hooks::Registered } else { Hooks::Absent }
}

/// Returns whether sets and chains are as we build them, with all base chains or none. Otherwise one transaction rebuilds
/// the table.
fn structure_fits<const N: usize>(dump: &TableDump<N>) -> bool {
    let layout = Layout::new(N);
    let sets = layout.sets().iter().all(|set| dump.sets.get(&set.name).is_some_and(|found| found.is(set)));
    let lists = dump.sets.iter().all(|(name, found)| {
        let list = source_list_of(name);
        list.is_none_or(|list| found.is(&layout.source_list(list)))
    });
    let all = layout.chains(&RuleConfig::default());
    let absent = |chain: &Chain| chain.hook.is_some() && !dump.chains.contains_key(&chain.name);
    let without_hooks = all.iter().filter(|chain| chain.hook.is_some()).all(absent);
    let chains = all.iter().all(|chain| {
        if without_hooks && absent(chain) {
            return true;
        }
        let wanted = chain.hook.map(|hook| DumpedHook {
            kind: hook.kind.to_owned(),
            number: hook.number,
            priority: hook.priority,
            policy: POLICY,
        });
        dump.chains.get(&chain.name) == Some(&wanted)
    });
    sets && lists && chains && dump.flags == 0 && dump.unknown == 0
}

#[cfg(test)]
mod tests;
