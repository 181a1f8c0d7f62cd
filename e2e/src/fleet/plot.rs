//! Growth of the costs with the number of agents, as SVG plots with fitted exponents.

use std::fmt::Write as _;

use super::Figures;

/// Size of a plot, and margins around its axes, in pixels.
const SIZE: (f64, f64) = (640.0, 400.0);
const MARGIN: (f64, f64) = (70.0, 50.0);
/// Colors of the series, distinguishable without red and green.
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];

/// A plot as a file.
#[derive(Debug)]
pub struct Plot {
    /// Name of the file.
    pub file: &'static str,
    /// Its content.
    pub svg: String,
}

/// One cost at several fleet sizes.
struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

impl Series {
    fn new(label: impl Into<String>, points: impl Iterator<Item = (f64, f64)>) -> Self {
        // Logarithmic axes have no place for zero.
        let points = points.filter(|(x, y)| *x > 0.0 && *y > 0.0 && y.is_finite()).collect();
        Self { label: label.into(), points }
    }
}

/// Plots all costs of fleets of at least two sizes.
#[must_use]
pub fn plots(all: &[Figures]) -> Vec<Plot> {
    let of = |cost: &dyn Fn(&Figures) -> f64| -> Vec<(f64, f64)> {
        all.iter().map(|figures| (figures.nodes as f64, cost(figures))).collect()
    };
    let mut changes = vec![Series::new(
        "one change at a time",
        of(&|figures| figures.single.as_ref().map_or(0.0, |single| single.cpu_milliseconds)).into_iter(),
    )];
    for rate in rates(all) {
        let cost = |figures: &Figures| {
            let found = figures.rates.iter().find(|one| one.per_second == rate);
            found.map_or(0.0, |one| one.cpu_milliseconds)
        };
        changes.push(Series::new(format!("{rate} changes/s"), of(&cost).into_iter()));
    }
    let join = [
        Series::new("all views", of(&|figures| figures.join.cpu).into_iter()),
        Series::new("all views and rows", of(&|figures| figures.join.rows_cpu).into_iter()),
    ];
    let memory = [Series::new("resident", of(&|figures| figures.join.memory).into_iter())];
    let idle = [Series::new("idle", of(&|figures| figures.idle.core_percent).into_iter())];
    vec![
        Plot { file: "change.svg", svg: svg("Controller CPU time per change, ms", &changes) },
        Plot { file: "join.svg", svg: svg("Controller CPU time of a join, s", &join) },
        Plot { file: "memory.svg", svg: svg("Controller memory, MiB", &memory) },
        Plot { file: "idle.svg", svg: svg("Controller CPU while idle, % of a core", &idle) },
    ]
}

fn rates(all: &[Figures]) -> Vec<u32> {
    let mut rates: Vec<u32> =
        all.iter().flat_map(|figures| &figures.rates).map(|one| one.per_second).collect();
    rates.sort_unstable();
    rates.dedup();
    rates
}

/// Exponent and factor of the power law that fits the points best; `None` for fewer than two sizes.
fn fit(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| logs.iter().map(pick).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = logs.iter().map(|point| (point.0 - x).powi(2)).sum();
    if logs.len() < 2 || spread == 0.0 {
        return None;
    }
    let slope = logs.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>() / spread;
    Some((slope, (y - slope * x).exp()))
}

/// A logarithmic axis.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min) * 0.8;
        let high = values.fold(0.0, f64::max) * 1.25;
        Self { low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        self.from + share * (self.to - self.from)
    }

    /// Returns 1, 2 and 5 times each power of ten within the axis.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let all = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10_f64.powi(decade)));
        let (low, high) = (self.low, self.high);
        all.filter(move |tick| (low..=high).contains(tick))
    }
}

fn svg(title: &str, series: &[Series]) -> String {
    let (width, height) = SIZE;
    let (left, top) = MARGIN;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{left}\" y=\"20\" font-size=\"14\">{title}, by number of agents</text>\n"
    );
    let points = || series.iter().flat_map(|one| &one.points);
    if points().next().is_none() {
        text.push_str("</svg>\n");
        return text;
    }
    let x = Axis::new(points().map(|point| point.0), left, width - 20.0);
    let y = Axis::new(points().map(|point| point.1), height - top, 40.0);
    // Writing to a String does not fail.
    for tick in x.ticks() {
        let at = x.at(tick);
        let _ = writeln!(text, "<path d=\"M{at:.1} 40V{:.1}\" stroke=\"#dddddd\"/>", height - top);
        let _ = writeln!(
            text,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
            height - top + 18.0
        );
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = writeln!(text, "<path d=\"M{left} {at:.1}H{:.1}\" stroke=\"#dddddd\"/>", width - 20.0);
        let label = format!("{tick:.3}");
        let label =
            if label.contains('.') { label.trim_end_matches('0').trim_end_matches('.') } else { &label };
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 6.0,
            at + 4.0
        );
    }
    for (number, one) in series.iter().enumerate() {
        draw(&mut text, number, one, &x, &y);
    }
    text.push_str("</svg>\n");
    text
}

/// Draws points, the fitted line and the legend.
fn draw(text: &mut String, number: usize, series: &Series, x: &Axis, y: &Axis) {
    let color = COLORS[number % COLORS.len()];
    for (nodes, cost) in &series.points {
        let (cx, cy) = (x.at(*nodes), y.at(*cost));
        let _ = writeln!(text, "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\" fill=\"{color}\"/>");
    }
    let mut label = series.label.clone();
    if let Some((exponent, factor)) = fit(&series.points) {
        let _ = write!(label, ": agents^{exponent:.2}");
        let end = |nodes: f64| (x.at(nodes), y.at(factor * nodes.powf(exponent)));
        let nodes = series.points.iter().map(|point| point.0);
        let (from, to) = (end(nodes.clone().fold(f64::INFINITY, f64::min)), end(nodes.fold(0.0, f64::max)));
        let _ = writeln!(
            text,
            "<path d=\"M{:.1} {:.1}L{:.1} {:.1}\" stroke=\"{color}\" stroke-dasharray=\"4 3\"/>",
            from.0, from.1, to.0, to.1
        );
    }
    let line = 56.0 + 16.0 * number as f64;
    let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{line}\" fill=\"{color}\">{label}</text>", MARGIN.0 + 10.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fit_finds_the_exponent_of_a_power_law() {
        let points: Vec<_> = [100.0, 500.0, 1_000.0, 5_000.0].map(|x: f64| (x, 0.3 * x.powf(1.2))).into();
        let (exponent, factor) = fit(&points).unwrap();
        assert!((exponent - 1.2).abs() < 1e-9 && (factor - 0.3).abs() < 1e-9, "{exponent} {factor}");
        assert_eq!(fit(&points[..1]), None);
        assert_eq!(fit(&[]), None);
    }

    #[test]
    fn plot_names_series_and_exponent() {
        let series =
            Series::new("join", [(100.0, 1.0), (1_000.0, 10.0), (0.0, 1.0), (10.0, f64::NAN)].into_iter());
        assert_eq!(series.points.len(), 2);
        let svg = svg("CPU", &[series]);
        assert!(svg.contains("join: agents^1.00") && svg.matches("<circle").count() == 2, "{svg}");
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
