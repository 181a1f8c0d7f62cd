{{- /* Image reference. Argument: list of the root context and the name of the image. */ -}}
{{- define "switchtower.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.imageRegistry }}/{{ index . 1 }}:{{ $root.Values.imageTag | default $root.Chart.AppVersion }}
{{- end -}}

{{- /*
Objects of a file of manifests/, with the namespace of the release. Argument: list of the root context, path, and
additional labels.
*/ -}}
{{- define "switchtower.objects" -}}
{{- $root := index . 0 -}}
{{- range splitList "\n---\n" ($root.Files.Get (index . 1)) }}
{{- $object := fromYaml . }}
{{- if hasKey $object "kind" }}
{{- if not (hasPrefix "Cluster" $object.kind) }}
{{- $_ := set $object.metadata "namespace" $root.Release.Namespace }}
{{- end }}
{{- range $subject := $object.subjects }}
{{- $_ := set $subject "namespace" $root.Release.Namespace }}
{{- end }}
{{- with merge dict (index $ 2) ($object.metadata.labels | default dict) }}
{{- $_ := set $object.metadata "labels" . }}
{{- end }}
---
{{ toYaml $object }}
{{ end }}
{{- end }}
{{- end -}}
