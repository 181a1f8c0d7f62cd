//! Encoder of metrics as OpenMetrics 1.0 text, the format with exemplars. Pure.
//!
//! Differences from the Prometheus text format: a counter's family is named without `_total`, bounds of buckets are
//! written as floats, buckets may have an exemplar, and the text ends in `# EOF`.

use std::fmt::{self, Write as _};

use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};

use super::exemplars::{Exemplar, Exemplars};

/// The media type.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text of these families.
///
/// # Errors
/// A number or a text cannot be written, which no String causes.
pub(super) fn encode(families: &[MetricFamily], exemplars: &Exemplars) -> Result<String, fmt::Error> {
    let mut out = String::new();
    for family in families {
        encode_family(&mut out, family, exemplars)?;
    }
    out.push_str("# EOF\n");
    Ok(out)
}

fn encode_family(out: &mut String, family: &MetricFamily, exemplars: &Exemplars) -> fmt::Result {
    let name = family.name();
    // A counter of another name is none to OpenMetrics.
    let counter = name.strip_suffix("_total").filter(|_| family.get_field_type() == MetricType::COUNTER);
    let (base, kind) = match (family.get_field_type(), counter) {
        (MetricType::COUNTER, Some(base)) => (base, "counter"),
        (MetricType::GAUGE, _) => (name, "gauge"),
        (MetricType::HISTOGRAM, _) => (name, "histogram"),
        (MetricType::SUMMARY, _) => (name, "summary"),
        _ => (name, "unknown"),
    };
    writeln!(out, "# TYPE {base} {kind}")?;
    if !family.help().is_empty() {
        writeln!(out, "# HELP {base} {}", Escaped(family.help()))?;
    }
    for metric in family.get_metric() {
        match family.get_field_type() {
            MetricType::COUNTER => sample(out, name, metric, None, metric.get_counter().get_value())?,
            MetricType::GAUGE => sample(out, name, metric, None, metric.get_gauge().get_value())?,
            // The prometheus crate makes none.
            MetricType::UNTYPED => {}
            MetricType::HISTOGRAM => histogram(out, name, metric, exemplars)?,
            MetricType::SUMMARY => summary(out, name, metric)?,
        }
    }
    Ok(())
}

fn histogram(out: &mut String, name: &str, metric: &Metric, exemplars: &Exemplars) -> fmt::Result {
    let histogram = metric.get_histogram();
    let label = metric.get_label().first().map_or("", LabelPair::value);
    let finite = histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite());
    let buckets = finite.map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
    let all = buckets.chain([(f64::INFINITY, histogram.get_sample_count())]);
    for (index, (bound, count)) in all.enumerate() {
        let bound = Number(bound).to_string();
        line(out, &format!("{name}_bucket"), metric, Some(("le", &bound)))?;
        write!(out, " {count}")?;
        if let Some(exemplar) = exemplars.of(name, label, index) {
            let Exemplar { trace, value, at } = exemplar;
            write!(out, " # {{trace_id=\"{trace:032x}\"}} {} {at:.3}", Number(value))?;
        }
        out.push('\n');
    }
    sample(out, &format!("{name}_sum"), metric, None, histogram.get_sample_sum())?;
    line(out, &format!("{name}_count"), metric, None)?;
    writeln!(out, " {}", histogram.get_sample_count())
}

fn summary(out: &mut String, name: &str, metric: &Metric) -> fmt::Result {
    let summary = metric.get_summary();
    for quantile in summary.get_quantile() {
        let at = Number(quantile.quantile()).to_string();
        sample(out, name, metric, Some(("quantile", &at)), quantile.value())?;
    }
    sample(out, &format!("{name}_sum"), metric, None, summary.sample_sum())?;
    line(out, &format!("{name}_count"), metric, None)?;
    writeln!(out, " {}", summary.sample_count())
}

fn sample(
    out: &mut String,
    name: &str,
    metric: &Metric,
    more: Option<(&str, &str)>,
    value: f64,
) -> fmt::Result {
    line(out, name, metric, more)?;
    writeln!(out, " {}", Number(value))
}

/// A sample's name and labels.
fn line(out: &mut String, name: &str, metric: &Metric, more: Option<(&str, &str)>) -> fmt::Result {
    out.push_str(name);
    let own = metric.get_label().iter().map(|label| (label.name(), label.value()));
    let mut before = '{';
    for (key, value) in own.chain(more) {
        write!(out, "{before}{key}=\"{}\"", Escaped(value))?;
        before = ',';
    }
    if before == ',' {
        out.push('}');
    }
    Ok(())
}

/// A float as OpenMetrics writes it.
struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            value if value.is_nan() => formatter.write_str("NaN"),
            value if value == f64::INFINITY => formatter.write_str("+Inf"),
            value if value == f64::NEG_INFINITY => formatter.write_str("-Inf"),
            // With a point: 1 is written 1.0.
            value => write!(formatter, "{value:?}"),
        }
    }
}

/// Help and values of labels.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => formatter.write_str("\\\\")?,
                '\n' => formatter.write_str("\\n")?,
                '"' => formatter.write_str("\\\"")?,
                other => formatter.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// Returns true if a scraper with this `Accept` header prefers OpenMetrics to the Prometheus text format.
#[must_use]
pub(super) fn is_preferred(accept: &str) -> bool {
    let (mut open_metrics, mut text) = (0.0_f64, 0.0_f64);
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (mut quality, mut known) = (1.0, true);
        for parameter in parts {
            match parameter.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
                Some(("q", value)) => quality = value.parse().unwrap_or(0.0),
                Some(("version", value)) => known = value == "1.0.0",
                _ => {}
            }
        }
        match media.as_str() {
            "application/openmetrics-text" if known => open_metrics = open_metrics.max(quality),
            "text/plain" | "text/*" | "*/*" => text = text.max(quality),
            _ => {}
        }
    }
    open_metrics > 0.0 && open_metrics >= text
}

#[cfg(test)]
mod tests {
    use prometheus::{Gauge, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

    use super::*;

    fn registry() -> Registry {
        let registry = Registry::new();
        let named =
            IntCounterVec::new(Opts::new("asked_total", "A \"quoted\"\nhelp with \\."), &["by"]).unwrap();
        named.with_label_values(&["a\"b\\c\nd"]).inc_by(3);
        let odd = IntCounter::new("odd", "A counter of another name.").unwrap();
        let gauge = Gauge::new("share", "A share.").unwrap();
        gauge.set(0.25);
        let options = HistogramOpts::new("seconds", "Time.").buckets(vec![0.5, 1.0]);
        let histogram = HistogramVec::new(options, &["nodes"]).unwrap();
        for value in [0.25, 0.75, 4.0] {
            histogram.with_label_values(&["99%"]).observe(value);
        }
        registry.register(Box::new(named)).unwrap();
        registry.register(Box::new(odd)).unwrap();
        registry.register(Box::new(gauge)).unwrap();
        registry.register(Box::new(histogram)).unwrap();
        registry
    }

    #[test]
    fn text_is_open_metrics() {
        let exemplars = Exemplars::default();
        let exemplar = Exemplar { trace: 0xabc, value: 0.75, at: 1_700_000_000.5 };
        exemplars.note("seconds", "99%", &[0.5, 1.0], exemplar);
        let text = encode(&registry().gather(), &exemplars).unwrap();
        let wanted = r##"# TYPE asked counter
# HELP asked A \"quoted\"\nhelp with \\.
asked_total{by="a\"b\\c\nd"} 3.0
# TYPE odd unknown
# HELP odd A counter of another name.
odd 0.0
# TYPE seconds histogram
# HELP seconds Time.
seconds_bucket{nodes="99%",le="0.5"} 1
seconds_bucket{nodes="99%",le="1.0"} 2 # {trace_id="00000000000000000000000000000abc"} 0.75 1700000000.500
seconds_bucket{nodes="99%",le="+Inf"} 3
seconds_sum{nodes="99%"} 5.0
seconds_count{nodes="99%"} 3
# TYPE share gauge
# HELP share A share.
share 0.25
# EOF
"##;
        assert_eq!(text, wanted);
        assert_eq!(encode(&[], &Exemplars::default()).unwrap(), "# EOF\n");
        assert_eq!(Number(f64::NAN).to_string(), "NaN");
        assert_eq!(Number(f64::NEG_INFINITY).to_string(), "-Inf");
    }

    #[test]
    fn open_metrics_served_on_request() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";
        for accept in
            ["application/openmetrics-text", "Application/OpenMetrics-Text; version=1.0.0", prometheus]
        {
            assert!(is_preferred(accept), "{accept}");
        }
        let others = [
            "",
            "*/*",
            "text/plain",
            "application/openmetrics-text; version=0.0.1",
            "application/openmetrics-text; version=1.0.0; q=0.1, text/plain; q=0.5",
            "application/openmetrics-text; q=0",
            "application/openmetrics-text; q=much",
        ];
        for accept in others {
            assert!(!is_preferred(accept), "{accept}");
        }
    }
}
