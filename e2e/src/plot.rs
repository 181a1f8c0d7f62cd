//! Growth of costs as SVG plots: logarithmic axes, points and the power law that fits best.

use std::fmt::Write as _;

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

/// One cost at several sizes.
#[derive(Debug)]
pub struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

impl Series {
    /// A cost with its name. Points are (size, cost); those that are not positive are left out.
    pub fn new(label: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        // Logarithmic axes have no place for zero.
        let points = points.into_iter().filter(|(x, y)| *x > 0.0 && *y > 0.0 && y.is_finite()).collect();
        Self { label: label.into(), points }
    }

    /// Its name.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The exponent of the power law that fits best; `None` for fewer than two sizes.
    #[must_use]
    pub fn exponent(&self) -> Option<f64> {
        fit(&self.points).map(|(exponent, _)| exponent)
    }
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

/// Draws costs by the number of `units`.
#[must_use]
pub fn svg(title: &str, units: &str, series: &[Series]) -> String {
    let (width, height) = SIZE;
    let (left, top) = MARGIN;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{left}\" y=\"20\" font-size=\"14\">{title}, by number of {units}</text>\n"
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
        draw(&mut text, (number, units), one, (&x, &y));
    }
    text.push_str("</svg>\n");
    text
}

/// Draws points, the fitted line and the legend.
fn draw(text: &mut String, (number, units): (usize, &str), series: &Series, (x, y): (&Axis, &Axis)) {
    let color = COLORS[number % COLORS.len()];
    for (nodes, cost) in &series.points {
        let (cx, cy) = (x.at(*nodes), y.at(*cost));
        let _ = writeln!(text, "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\" fill=\"{color}\"/>");
    }
    let mut label = series.label.clone();
    if let Some((exponent, factor)) = fit(&series.points) {
        let _ = write!(label, ": {units}^{exponent:.2}");
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
        let series = Series::new("join", [(100.0, 1.0), (1_000.0, 10.0), (0.0, 1.0), (10.0, f64::NAN)]);
        assert_eq!(series.points.len(), 2);
        let svg = svg("CPU", "agents", &[series]);
        assert!(svg.contains("join: agents^1.00") && svg.matches("<circle").count() == 2, "{svg}");
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
