//! Growth of the controller's costs with the number of agents.

use super::Figures;
use crate::plot::{Plot, Series, svg};

/// Plots all costs of fleets of at least two sizes.
#[must_use]
pub fn plots(all: &[Figures]) -> Vec<Plot> {
    let of = |cost: &dyn Fn(&Figures) -> f64| -> Vec<(f64, f64)> {
        all.iter().map(|figures| (figures.nodes as f64, cost(figures))).collect()
    };
    let mut changes = vec![Series::new(
        "one change at a time",
        of(&|figures| figures.single.as_ref().map_or(0.0, |single| single.cpu_milliseconds)),
    )];
    for rate in rates(all) {
        let cost = |figures: &Figures| {
            let found = figures.rates.iter().find(|one| one.per_second == rate);
            found.map_or(0.0, |one| one.cpu_milliseconds)
        };
        changes.push(Series::new(format!("{rate} changes/s"), of(&cost)));
    }
    let join = [
        Series::new("all views", of(&|figures| figures.join.cpu)),
        Series::new("all views and rows", of(&|figures| figures.join.rows_cpu)),
    ];
    let memory = [Series::new("resident", of(&|figures| figures.join.memory))];
    let idle = [Series::new("idle", of(&|figures| figures.idle.core_percent))];
    vec![
        Plot { file: "change.svg", svg: svg("Controller CPU time per change, ms", "agents", &changes) },
        Plot { file: "join.svg", svg: svg("Controller CPU time of a join, s", "agents", &join) },
        Plot { file: "memory.svg", svg: svg("Controller memory, MiB", "agents", &memory) },
        Plot { file: "idle.svg", svg: svg("Controller CPU while idle, % of a core", "agents", &idle) },
    ]
}

fn rates(all: &[Figures]) -> Vec<u32> {
    let mut rates: Vec<u32> =
        all.iter().flat_map(|figures| &figures.rates).map(|one| one.per_second).collect();
    rates.sort_unstable();
    rates.dedup();
    rates
}
