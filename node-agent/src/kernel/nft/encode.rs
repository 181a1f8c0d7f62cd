//! One family's part of a transaction: structure, elements, stamp, in an order that the kernel accepts.
//!
//! Chains before the rules that name them, maps before chains, deletions of elements before additions (adding
//! a present key with other data is refused), base chains last: a packet sees nothing or everything.

use std::collections::{BTreeMap, BTreeSet};

use super::dump::{DumpedHook, TableDump};
use super::element::{Changes, Data, Element};
use super::layout::{Chain, Layout, RuleConfig, SetSpec, TABLE, source_list_name, source_list_of};
use super::mirror::Mirror;
use super::netlink::{
    Batch, CREATE, DELETE_CHAIN, DELETE_ELEMENT, DELETE_RULE, DELETE_SET, DELETE_TABLE, NEW_CHAIN,
    NEW_ELEMENT, NEW_SET, NEW_TABLE,
};
use super::wire::Writer;

/// Bytes of elements per message: a nest holds less than 64 KiB.
const CHUNK: usize = 60_000;
/// `NF_ACCEPT`, the policy of all our base chains.
const ACCEPT: u32 = 1;

/// One entry of the mirror's record: the element, and its value before and after.
type Change<'a, const N: usize> = (&'a Element<N>, &'a (Option<Data<N>>, Option<Data<N>>));

/// What is known of one table's structure in the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Structure {
    /// The table exists as we built it; false: (re)create it in the next transaction.
    pub(crate) built: bool,
    /// There is no table at all: it may be built in parts, since nothing is taken away meanwhile.
    pub(crate) absent: bool,
    /// The configuration that the chains in the kernel were written with.
    pub(crate) config: RuleConfig,
    /// Chains whose rules are not ours: rewritten in the next transaction.
    pub(crate) broken: Vec<String>,
    /// Chains and sets that are not ours: removed in the next transaction.
    pub(crate) foreign_chains: Vec<String>,
    pub(crate) foreign_sets: Vec<String>,
    /// The stamp's entries in the kernel.
    pub(crate) stamp: BTreeMap<u32, [u8; 16]>,
}

/// Which changes a message of elements holds, for errors.
#[derive(Debug)]
struct Group<const N: usize> {
    message: usize,
    /// The element of each list entry; an interval takes two.
    elements: Vec<Element<N>>,
    deletes: bool,
}

/// Maps refused messages back to elements.
#[derive(Debug)]
pub(crate) struct Encoded<const N: usize> {
    groups: Vec<Group<N>>,
    /// Operations written, the stamp not counted.
    pub(crate) operations: u32,
}

impl<const N: usize> Encoded<N> {
    /// The element at a list position of a message, and whether it was to be deleted. Without a position only
    /// if the message holds one element.
    pub(crate) fn element(&self, message: usize, position: Option<usize>) -> Option<(Element<N>, bool)> {
        let group = self.groups.iter().find(|group| group.message == message)?;
        let position = position
            .or_else(|| group.elements.iter().all(|other| *other == group.elements[0]).then_some(0))?;
        Some((*group.elements.get(position)?, group.deletes))
    }

    /// Whether a message holds elements.
    pub(crate) fn has(&self, message: usize) -> bool {
        self.groups.iter().any(|group| group.message == message)
    }
}

/// Writes what one family changes. `chunk` elements at most per message.
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
        rewrite_chains(batch, layout, structure, mirror);
    }
    let deletes = changes.iter().filter(|(_, (before, _))| before.is_some());
    let deletes: Vec<(Element<N>, Option<Data<N>>)> = deletes.map(|(element, _)| (**element, None)).collect();
    elements += write_elements(batch, layout, &mut encoded, &deletes, (true, chunk));
    let adds = changes.iter().filter(|(_, (_, after))| after.is_some());
    let adds: Vec<(Element<N>, Option<Data<N>>)> =
        adds.map(|(element, (_, after))| (**element, *after)).collect();
    elements += write_elements(batch, layout, &mut encoded, &adds, (false, chunk));
    if !structure.built {
        for chain in chains.iter().filter(|chain| chain.hook.is_some()) {
            new_chain(batch, layout, chain);
            write_rules(batch, layout, chain, false);
        }
    }
    old_structure(batch, layout, &changes, structure);
    let messages = batch.len() - start - encoded.groups.len();
    encoded.operations = (messages + elements) as u32;
    write_stamp(batch, layout, structure, stamp);
    encoded
}

/// Writes the removal of one element.
pub(crate) fn removal<const N: usize>(batch: &mut Batch, element: Element<N>) {
    let mut encoded = Encoded { groups: Vec::new(), operations: 0 };
    write_elements(batch, Layout::new(N), &mut encoded, &[(element, None)], (true, usize::MAX));
}

/// Creates the table, its constant sets and chains; base chains come at the end.
fn build(batch: &mut Batch, layout: Layout, chains: &[Chain]) {
    let table = |batch: &mut Batch, kind, flags| {
        batch.push(kind, flags, layout.family, |writer| {
            writer.string(1, TABLE);
            if kind == NEW_TABLE {
                writer.number(2, 0);
            }
        });
    };
    // Create, delete, create: works whether the table exists or not, and leaves nothing of an old one.
    table(batch, NEW_TABLE, CREATE);
    table(batch, DELETE_TABLE, 0);
    table(batch, NEW_TABLE, CREATE);
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
    batch.push(NEW_SET, CREATE, layout.family, |writer| {
        writer.string(1, TABLE);
        writer.string(2, &set.name);
        writer.number(3, set.flags);
        writer.number(4, set.key.0);
        writer.number(5, set.key.1);
        if let Some((kind, length)) = set.data {
            writer.number(6, kind);
            writer.number(7, length);
        }
        writer.nest(9, |writer| {
            if let Some(size) = set.size {
                writer.number(1, size);
            }
        });
        writer.number(10, id);
        writer.attribute(13, set.user_data);
    });
}

fn new_chain(batch: &mut Batch, layout: Layout, chain: &Chain) {
    batch.push(NEW_CHAIN, CREATE, layout.family, |writer| {
        writer.string(1, TABLE);
        writer.string(3, &chain.name);
        if let Some(hook) = &chain.hook {
            writer.nest(4, |writer| {
                writer.number(1, hook.number);
                writer.number(2, hook.priority as u32);
            });
            writer.number(5, ACCEPT);
            writer.string(7, hook.kind);
        }
    });
}

/// Appends a chain's rules, after removing those that are there if `replace`.
fn write_rules(batch: &mut Batch, layout: Layout, chain: &Chain, replace: bool) {
    if replace {
        flush_chain(batch, layout, &chain.name);
    }
    for rule in &chain.rules {
        rule.append(batch, layout.family, TABLE, &chain.name);
    }
}

fn flush_chain(batch: &mut Batch, layout: Layout, chain: &str) {
    batch.push(DELETE_RULE, 0, layout.family, |writer| {
        writer.string(1, TABLE);
        writer.string(2, chain);
    });
}

/// Sets and chains that new elements need.
fn new_structure<const N: usize>(batch: &mut Batch, layout: Layout, changes: &[Change<'_, N>]) {
    for (element, (_, after)) in changes {
        if let (Element::SourceList(list), Some(_)) = (element, after) {
            new_set(batch, layout, &layout.source_list(*list));
            let chain = layout.source_chain(*list);
            new_chain(batch, layout, &chain);
            // The chain may be there although no element leads to it, if someone else removed that.
            write_rules(batch, layout, &chain, true);
        }
    }
}

/// Removes chains and sets that no element needs any more, and what is not ours.
fn old_structure<const N: usize>(
    batch: &mut Batch,
    layout: Layout,
    changes: &[Change<'_, N>],
    structure: &Structure,
) {
    let delete = |batch: &mut Batch, kind, attribute, name: &str| {
        batch.push(kind, 0, layout.family, |writer| {
            writer.string(1, TABLE);
            writer.string(attribute, name);
        });
    };
    // Before any chain: a verdict map of somebody may lead to it.
    if structure.built {
        structure.foreign_sets.iter().for_each(|name| delete(batch, DELETE_SET, 2, name));
    }
    for (element, (_, after)) in changes {
        if let (Element::SourceList(list), None) = (element, after) {
            let name = source_list_name(*list);
            delete(batch, DELETE_CHAIN, 3, &name);
            delete(batch, DELETE_SET, 2, &name);
        }
    }
    if structure.built {
        structure.foreign_chains.iter().for_each(|name| delete(batch, DELETE_CHAIN, 3, name));
    }
}

fn remove_foreign_rules(batch: &mut Batch, layout: Layout, structure: &Structure) {
    structure.foreign_chains.iter().for_each(|chain| flush_chain(batch, layout, chain));
}

/// Writes anew the chains whose rules are not what they should be.
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
    for chain in layout.chains(config).into_iter().chain(lists) {
        if structure.broken.contains(&chain.name) || changed.contains(&chain.name) {
            write_rules(batch, layout, &chain, true);
        }
    }
}

/// Chains whose rules differ between the configuration in the kernel and the wanted one.
fn changed_chains(layout: Layout, structure: &Structure, config: &RuleConfig) -> Vec<String> {
    if structure.config == *config {
        return Vec::new();
    }
    let pairs = layout.chains(&structure.config).into_iter().zip(layout.chains(config));
    pairs.filter(|(old, new)| old != new).map(|(_, new)| new.name).collect()
}

/// Writes elements, grouped by set; returns how many.
fn write_elements<const N: usize>(
    batch: &mut Batch,
    layout: Layout,
    encoded: &mut Encoded<N>,
    elements: &[(Element<N>, Option<Data<N>>)],
    (deletes, chunk): (bool, usize),
) -> usize {
    let (kind, flags) = if deletes { (DELETE_ELEMENT, 0) } else { (NEW_ELEMENT, CREATE) };
    let mut rest = elements;
    while let Some(set) = rest.first().map(|(element, _)| element.set()) {
        let mut taken = 0;
        let mut entries = Vec::new();
        let message = batch.len();
        batch.push(kind, flags, layout.family, |writer: &mut Writer| {
            writer.string(1, TABLE);
            writer.string(2, &set);
            writer.nest(3, |writer| {
                let start = writer.bytes.len();
                for (element, data) in rest {
                    let full = writer.bytes.len() - start > CHUNK || taken >= chunk;
                    if full || element.set() != set {
                        break;
                    }
                    let count = element.encode(writer, data.as_ref());
                    entries.extend(std::iter::repeat_n(*element, count));
                    taken += 1;
                }
            });
        });
        encoded.groups.push(Group { message, elements: entries, deletes });
        rest = &rest[taken..];
    }
    elements.len()
}

fn write_stamp(batch: &mut Batch, layout: Layout, structure: &Structure, stamp: &BTreeMap<u32, [u8; 16]>) {
    let mut write = |kind, flags, entries: &[(u32, Option<[u8; 16]>)]| {
        if entries.is_empty() {
            return;
        }
        batch.push(kind, flags, layout.family, |writer| {
            writer.string(1, TABLE);
            writer.string(2, "stamp");
            writer.nest(3, |writer| {
                for (key, value) in entries {
                    writer.nest(1, |writer| {
                        writer.nest(1, |writer| writer.attribute(1, &key.to_ne_bytes()));
                        if let Some(value) = value {
                            writer.nest(2, |writer| writer.attribute(1, value));
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
    write(DELETE_ELEMENT, 0, &old);
    write(NEW_ELEMENT, CREATE, &new);
}

/// Compares a dump with what should be there: the structure as it is, what differs among the elements (left in
/// the mirror's changes), and the number of differences.
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
    let config = mirror.facts.rules.clone();
    let mut structure = Structure { built: true, stamp: dump.stamp, config, ..Structure::default() };
    let layout = Layout::new(N);
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
            structure.broken.push(name.clone());
        }
    }
    // A chain or set whose element is there goes with that.
    let goes = |name: &str| {
        let list = source_list_of(name);
        list.is_some_and(|list| dump.elements.contains_key(&Element::SourceList(list)))
    };
    let foreign = dump.chains.keys().filter(|name| !expected.contains_key(*name) && !goes(name));
    structure.foreign_chains.extend(foreign.cloned());
    let known: BTreeSet<String> = layout.sets().into_iter().map(|set| set.name).chain(lists).collect();
    let foreign = dump.sets.keys().filter(|name| !known.contains(*name) && !goes(name));
    structure.foreign_sets.extend(foreign.cloned());
    for (element, data) in &wanted {
        let before = dump.elements.remove(element);
        if before != Some(*data) {
            changes.0.insert(*element, (before, Some(*data)));
        }
    }
    changes.0.extend(dump.elements.into_iter().map(|(element, data)| (element, (Some(data), None))));
    let count = structure.broken.len() + structure.foreign_chains.len() + structure.foreign_sets.len();
    let count = (count + changes.0.len()) as u32;
    mirror.changes = changes;
    (structure, count)
}

/// Whether sets and base chains are as we build them. If not, the table is built anew, in one transaction.
fn structure_fits<const N: usize>(dump: &TableDump<N>) -> bool {
    let layout = Layout::new(N);
    let sets = layout.sets().iter().all(|set| dump.sets.get(&set.name).is_some_and(|found| found.is(set)));
    let lists = dump.sets.iter().all(|(name, found)| {
        let list = source_list_of(name);
        list.is_none_or(|list| found.is(&layout.source_list(list)))
    });
    let chains = layout.chains(&RuleConfig::default()).iter().all(|chain| {
        let wanted = chain.hook.map(|hook| DumpedHook {
            kind: hook.kind.to_owned(),
            number: hook.number,
            priority: hook.priority,
            policy: ACCEPT,
        });
        dump.chains.get(&chain.name) == Some(&wanted)
    });
    sets && lists && chains && dump.flags == 0 && dump.unknown == 0
}
