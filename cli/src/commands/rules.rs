//! `rules`: chains and map elements of a node, or the equivalent rules for one Service.

use switchtower_admin_api::{NodeRules, OPERATOR};

use crate::args::{Global, RulesArgs, ServiceName};
use crate::cluster::Cluster;
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::{Exit, Report, count, table};

pub(crate) async fn run(global: &Global, args: &RulesArgs) -> Result<Report, CliError> {
    let subject = args.service.as_deref().map(ServiceName::parse).transpose().map_err(CliError::new)?;
    let cluster = Cluster::new(global).await?;
    let mut controller = Controller::connect(global, &cluster, OPERATOR).await?;
    let node = escaped(&args.node);
    let query = match &subject {
        None => format!("filter={}&limit={}", escaped(&args.filter), args.limit),
        Some(ServiceName { namespace, name, port }) => {
            let namespace = namespace.as_deref().unwrap_or(cluster.namespace());
            let service = format!("service={}", escaped(&format!("{namespace}/{name}")));
            let port = port.as_ref().map(|port| format!("&port={}", escaped(port))).unwrap_or_default();
            service + &port
        }
    };
    let path = format!("/v1/nodes/{node}/rules?{query}");
    let rules: NodeRules = controller.get(&path).await?;
    Report::new(text(&rules), &rules, Exit::Ok)
}

fn text(rules: &NodeRules) -> String {
    let mut text = match &rules.kernel {
        Some(stage) => format!("{}: generation {} in the kernel\n\n", rules.node, stage.generation),
        None => format!("{}: no Switchtower tables, or tables of another layout\n\n", rules.node),
    };
    if !rules.services.is_empty() {
        return text + &rules.services.join("\n") + "\n";
    }
    let rows: Vec<Vec<String>> = rules
        .chains
        .iter()
        .map(|chain| {
            let foreign = if chain.foreign == 0 { "-".to_owned() } else { chain.foreign.to_string() };
            let name = format!("{} {}", chain.family, chain.name);
            vec![name, chain.rules.to_string(), foreign, chain.hook.clone()]
        })
        .collect();
    text += &table(&["CHAIN", "RULES", "FOREIGN", "HOOK"], &rows);
    text.push('\n');
    for element in &rules.elements {
        text += &format!("{element}\n");
    }
    let shown = rules.elements.len();
    let total = usize::try_from(rules.elements_total).unwrap_or(usize::MAX);
    text += &match total.saturating_sub(shown) {
        0 => format!("{}\n", count(total, "element")),
        more => format!("... and {more} more of {total} elements; use --limit or --filter\n"),
    };
    text
}

#[cfg(test)]
mod tests {
    use switchtower_admin_api::{ChainInfo, Stage};

    use super::*;

    #[test]
    fn chains_precede_elements() {
        let chain = |name: &str, hook: &str, foreign| ChainInfo {
            family: "ip".into(),
            name: name.into(),
            hook: hook.into(),
            rules: 3,
            foreign,
        };
        let rules = NodeRules {
            node: "alpha".into(),
            kernel: Some(Stage { generation: 7, digest: String::new() }),
            services: vec![],
            chains: vec![chain("nat_output", "nat hook output priority -101", 0), chain("services", "", 1)],
            elements: vec!["ip frontends 10.96.0.1:80/TCP : 0x00002007".into()],
            elements_total: 5,
        };
        let wanted = "\
alpha: generation 7 in the kernel

CHAIN          RULES  FOREIGN  HOOK
ip nat_output  3      -        nat hook output priority -101
ip services    3      1

ip frontends 10.96.0.1:80/TCP : 0x00002007
... and 4 more of 5 elements; use --limit or --filter
";
        assert_eq!(text(&rules), wanted);
        let of_service =
            NodeRules { services: vec!["ip daddr 10.96.0.1 tcp dport 80 reject".into()], ..rules };
        let wanted = "alpha: generation 7 in the kernel\n\nip daddr 10.96.0.1 tcp dport 80 reject\n";
        assert_eq!(text(&of_service), wanted);
    }
}
